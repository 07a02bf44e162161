import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyart import losses
from dyart.losses import adversarial_loss, clean_loss, fgsm_rs_loss, mart_loss, n_fgsm_loss, trades_loss

SINGLE_STEP = [n_fgsm_loss, fgsm_rs_loss]
LOSSES = [clean_loss, adversarial_loss, trades_loss, mart_loss, *SINGLE_STEP]


def small_model(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, classes)
    ).double()  # fmt: skip


def batch(n: int = 5, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 3, 3, generator=generator, dtype=torch.float64)
    x_adv = (x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return x, x_adv, torch.arange(n) % classes


def probabilities(model: nn.Module, x: torch.Tensor) -> list[list[float]]:
    """Softmax of the logits of a forward pass in train mode, in plain Python; `model` is not touched."""
    rows = copy.deepcopy(model).train()(x).tolist()
    return [[math.exp(z) / sum(math.exp(other) for other in row) for z in row] for row in rows]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def clean_definition(model, x, x_adv, y):
    p = probabilities(model, x)
    return sum(-math.log(p[i][y[i]]) for i in range(len(x))) / len(x)


def adversarial_definition(model, x, x_adv, y):
    q = probabilities(model, x_adv)
    return sum(-math.log(q[i][y[i]]) for i in range(len(x))) / len(x)


def trades_definition(model, x, x_adv, y, beta=6.0, smoothing=0.1):
    p, q, total = probabilities(model, x), probabilities(model, x_adv), 0.0
    for i in range(len(x)):
        for k, p_k in enumerate(p[i]):
            total -= ((1 - smoothing) * (k == y[i]) + smoothing / len(p[i])) * math.log(p_k)
        total += beta * kl(p[i], q[i])
    return total / len(x)


def mart_definition(model, x, x_adv, y, beta=6.0):
    p, q, total = probabilities(model, x), probabilities(model, x_adv), 0.0
    for i in range(len(x)):
        runner_up = max(q_k for k, q_k in enumerate(q[i]) if k != y[i])
        total += -math.log(q[i][y[i]]) - math.log(1.0001 - runner_up)
        total += beta * kl(p[i], q[i]) * (1 - p[i][y[i]])
    return total / len(x)


DEFINITIONS = {
    clean_loss: clean_definition,
    adversarial_loss: adversarial_definition,
    trades_loss: trades_definition,
    mart_loss: mart_definition,
    n_fgsm_loss: adversarial_definition,
    fgsm_rs_loss: adversarial_definition,
}


@pytest.fixture
def fixed_attack(monkeypatch):
    """Replaces the attack by one that returns a given x' and notes what it was asked for."""

    def install(x_adv: torch.Tensor) -> dict:
        asked = {}

        def pgd(model, x, y, **arguments):
            asked.update(arguments)
            return x_adv

        monkeypatch.setattr(losses, "pgd", pgd)
        return asked

    return install


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize(("n", "classes"), [(5, 3), (1, 2), (4, 2)])
def test_loss_is_the_definition(loss_of, n, classes, fixed_attack):
    model, (x, x_adv, y) = small_model(classes).eval(), batch(n, classes)
    expected = DEFINITIONS[loss_of](model, x, x_adv, y.tolist())
    fixed_attack(x_adv)
    loss, metrics = loss_of(model, x, y)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["loss"].item() == loss.item()
    terms = [metrics[name].item() for name in ("clean_loss", "robust_loss") if name in metrics]
    assert sum(terms) == pytest.approx(expected, rel=1e-12)
    for name, at in (("clean_accuracy", x), ("robust_accuracy", x_adv)):
        if name in metrics:
            p = probabilities(small_model(classes), at)
            right = [row.index(max(row)) == label for row, label in zip(p, y.tolist(), strict=True)]
            assert metrics[name].item() == pytest.approx(sum(right) / n)
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_are_those_documented():
    x, _, y = batch()
    clean, robust = {"clean_loss", "clean_accuracy"}, {"robust_loss", "robust_accuracy"}
    expected = [clean, robust, clean | robust, robust | {"clean_accuracy"}, robust, robust]
    for loss_of, names in zip(LOSSES, expected, strict=True):
        assert set(loss_of(small_model(), x, y)[1]) == names | {"loss"}


@pytest.mark.parametrize("loss_of", LOSSES)
def test_gradient_is_that_of_the_definition(loss_of, fixed_attack):
    model, (x, x_adv, y) = small_model(), batch()
    fixed_attack(x_adv)
    reference, step = copy.deepcopy(model), 1e-6
    loss_of(model, x, y)[0].backward()
    for parameter, moved in zip(model.parameters(), reference.parameters(), strict=True):
        flat = moved.data.view(-1)
        for i, slope in enumerate(parameter.grad.view(-1).tolist()):
            value = flat[i].item()
            ends = []
            for sign in (1, -1):
                flat[i] = value + sign * step
                ends.append(DEFINITIONS[loss_of](reference, x, x_adv, y.tolist()))
            flat[i] = value
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-7)


def test_weights_of_the_terms(fixed_attack):
    model, (x, x_adv, y) = small_model(), batch()
    fixed_attack(x_adv)
    trades = trades_loss(model, x, y, beta=1.5, label_smoothing=0.0)[0].item()
    assert trades == pytest.approx(trades_definition(model, x, x_adv, y.tolist(), 1.5, 0.0), rel=1e-12)
    mart = mart_loss(model, x, y, beta=1.5)[0].item()
    assert mart == pytest.approx(mart_definition(model, x, x_adv, y.tolist(), 1.5), rel=1e-12)


@pytest.mark.parametrize(
    ("loss_of", "attack"),
    [
        (adversarial_loss, {"objective": "ce", "start": "uniform"}),
        (trades_loss, {"objective": "kl", "start": "uniform", "mode": "batch"}),
        (mart_loss, {"objective": "ce", "start": "normal"}),
    ],
)
def test_each_loss_asks_for_its_attack(loss_of, attack, fixed_attack):
    x, x_adv, y = batch()
    asked = fixed_attack(x_adv)
    loss_of(small_model(), x, y)
    recipe = {"norm": "Linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "generator": None}
    assert asked == {**recipe, **attack}
    mine = {"norm": "L2", "eps": 0.5, "step_size": 0.1, "steps": 3, "generator": torch.Generator()}
    loss_of(small_model(), x, y, **mine)
    assert asked == {**mine, **attack}


# In units of ε: how far the noise of the start reaches, the step, and the ball that x' is projected onto.
FORMULAS = {n_fgsm_loss: (2.0, 1.0, math.inf), fgsm_rs_loss: (1.0, 1.25, 1.0)}


def single_step(model, x, y, noise, eps, reach, step, radius):
    """x' and its cross-entropy in train mode, by the formulas of the papers; `noise` lies in [-1, 1]."""
    model = copy.deepcopy(model).train()
    start = (x + eps * reach * noise).clamp(0, 1).requires_grad_(True)
    F.cross_entropy(model(start), y).backward()
    delta = (start.detach() + eps * step * start.grad.sign() - x).clamp(-eps * radius, eps * radius)
    x_adv = (x + delta).clamp(0, 1)
    return x_adv, F.cross_entropy(model(x_adv), y).item()


def linear_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()


@pytest.fixture
def attacked(monkeypatch):
    """The x' of each attack, which is held to leave the state of its model alone."""
    found, original = [], losses.pgd

    def pgd(model, *arguments, **options):
        before = copy.deepcopy(model.state_dict())
        found.append(original(model, *arguments, **options))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return found[-1]

    monkeypatch.setattr(losses, "pgd", pgd)
    return found


@pytest.mark.parametrize("loss_of", SINGLE_STEP)
@pytest.mark.parametrize("make", [linear_model, small_model])
def test_a_single_step_attack_is_its_formula(loss_of, make, attacked):
    model, (x, _, y), eps = make().eval(), batch(40), 0.15
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype) - 1
    expected, value = single_step(model, x, y, noise, eps, *FORMULAS[loss_of])
    loss, _ = loss_of(model, x, y, eps=eps, generator=torch.Generator().manual_seed(3))
    (x_adv,) = attacked
    torch.testing.assert_close(x_adv, expected, atol=1e-12, rtol=0)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert x_adv.amin() == 0 and x_adv.amax() == 1
    assert all(module.training for module in model.modules())
    # The statistics of the training pass, and no others, are written.
    assert make is linear_model or model[1].num_batches_tracked == 1


@pytest.mark.parametrize("loss_of", SINGLE_STEP)
def test_a_single_step_attack_in_l2(loss_of, attacked):
    """Of a linear model of two classes the steepest move is known, and here nothing meets the box."""
    model, y, eps = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double(), torch.arange(40) % 2, 0.05
    x = torch.full((40, 1, 3, 3), 0.5, dtype=torch.float64)
    uphill = (model[1].weight[1 - y] - model[1].weight[y]).detach()
    loss_of(model, x, y, norm="L2", eps=eps, generator=torch.Generator().manual_seed(0))
    move = (attacked[0] - x).flatten(1)
    if loss_of is n_fgsm_loss:
        noise = (move - eps * uphill / uphill.norm(dim=1, keepdim=True)).norm(dim=1)
        assert 1.9 * eps < noise.amax() <= 2 * eps
    else:
        assert move.norm(dim=1).amax() == pytest.approx(eps)
    assert ((move * uphill).sum(1) > 0).double().mean() > 0.7


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss_of", SINGLE_STEP)
def test_a_single_step_attack_depends_on_its_generator_alone(loss_of, norm, attacked):
    model, (x, _, y) = small_model(), batch()
    global_state = torch.get_rng_state()
    for seed in (0, 0, 1):
        loss_of(model, x, y, norm=norm, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(attacked[0], attacked[1]) and not torch.equal(attacked[0], attacked[2])
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("loss_of", "passes"), [(adversarial_loss, 1), (trades_loss, 2), (mart_loss, 2)])
def test_with_its_attack(loss_of, passes, norm):
    model, (x, _, y) = small_model().eval(), batch()
    model[0].bias.requires_grad_(False)
    attack = {"norm": norm, "eps": 0.2, "step_size": 0.1, "steps": 3}
    values = []
    for _ in range(2):
        loss, _ = loss_of(copy.deepcopy(model), x, y, generator=torch.Generator().manual_seed(0), **attack)
        values.append(loss.item())
    assert values[0] == values[1]
    loss, metrics = loss_of(model, x, y, generator=torch.Generator().manual_seed(0), **attack)
    assert all(module.training for module in model.modules())
    # The attack wrote no statistics: the counter knows of the training passes only.
    assert model[1].num_batches_tracked.item() == passes
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert [parameter.grad is None for parameter in model.parameters()] == [False, True] + 4 * [False]
    # It found inputs that are worse than x.
    weak, _ = loss_of(small_model(), x, y, norm=norm, eps=0.0)
    assert loss > weak


@pytest.mark.parametrize("loss_of", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("autocast", [False, True])
def test_saturated_logits_give_finite_loss_and_gradient(loss_of, scale, autocast):
    model, (x, _, y) = small_model().float(), batch()
    with torch.no_grad():
        model[4].weight.mul_(scale)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, metrics = loss_of(model, x.float(), y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("loss_of", LOSSES)
def test_empty_batch_is_refused(loss_of):
    with pytest.raises(ValueError, match=r"empty batch .* \(0, 1, 3, 3\)"):
        loss_of(small_model(), torch.rand(0, 1, 3, 3), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("loss_of", [trades_loss, mart_loss])
@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan])
def test_beta_out_of_range_is_refused(loss_of, beta):
    x, _, y = batch()
    with pytest.raises(ValueError, match=f"beta must be finite and at least 0, got {beta}"):
        loss_of(small_model(), x, y, beta=beta)
