import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from scipy.optimize import brentq
from torch import nn

from dyart.attacks import BALLS, OBJECTIVES, STARTS, pgd
from dyart.modes import frozen


def linear_model(d: int, classes: int = 2, seed: int = 0, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(d, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def conv_model(seed: int = 0) -> nn.Module:
    """A small network with everything that has a mode: BatchNorm and dropout. Inputs (n, 2, 4, 4), 3 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )


def pixels(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Pixels of which some lie on the border of the box."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.4 * x - 0.2).clamp(0, 1).to(dtype)


def uphill(model: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """The gradient of z_other − z_y of a linear model of two classes, (n, d)."""
    w = model[1].weight.detach()
    return w[1 - y] - w[y]


def end_of_l2_ball(x: np.ndarray, g: np.ndarray, eps: float) -> np.ndarray:
    """argmax g·δ over ‖δ‖₂ ≤ eps and x + δ in [0, 1] is δ = clamp(μ g), with μ by root finding."""

    def move(mu: float) -> np.ndarray:
        return np.clip(x + mu * g, 0, 1) - x

    if np.linalg.norm(move(1e6)) <= eps:
        return x + move(1e6)
    return x + move(brentq(lambda mu: np.linalg.norm(move(mu)) - eps, 0, 1e6, xtol=1e-14))


def worst_case(norm: str, x: torch.Tensor, g: torch.Tensor, eps: float) -> torch.Tensor:
    if norm == "Linf":
        return (x + eps * g.sign()).clamp(0, 1)
    return torch.stack([torch.from_numpy(end_of_l2_ball(a.numpy(), b.numpy(), eps)) for a, b in zip(x, g, strict=True)])


LINEAR_CASES = [("Linf", 8 / 255, 2 / 255, 10), ("Linf", 0.6, 0.2, 10), ("L2", 0.2, 0.1, 60), ("L2", 1.2, 0.8, 200)]


@pytest.mark.parametrize(("norm", "eps", "step_size", "steps"), LINEAR_CASES)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("objective", ["ce", "cw"])
def test_linear_model_worst_case(norm, eps, step_size, steps, objective, start):
    model, x, y = linear_model(7), pixels(6, 7), torch.tensor([0, 1, 0, 1, 1, 0])
    x_adv = pgd(model, x, y, norm=norm, eps=eps, step_size=step_size, steps=steps, objective=objective, start=start)
    expected = worst_case(norm, x, uphill(model, y), eps)
    assert (expected - x).abs().amax() > 0.9 * eps / 7**0.5
    torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps", "step_size", "steps"), LINEAR_CASES)
def test_linear_model_worst_case_kl(norm, eps, step_size, steps):
    # KL(p(x) ‖ p(x')) is convex along w, so that its maximum lies at one of two ends, whatever the label.
    model, x, y = linear_model(7), pixels(6, 7), torch.tensor([0, 1, 0, 1, 1, 0])
    ends = [worst_case(norm, x, sign * uphill(model, torch.zeros_like(y)), eps) for sign in (1, -1)]
    p = F.softmax(model(x), 1)
    kl = torch.stack([(p * (p / F.softmax(model(end), 1)).log()).sum(1) for end in ends])
    expected = torch.where((kl[0] > kl[1])[:, None], *ends)
    x_adv = pgd(
        model, x, y, norm=norm, eps=eps, step_size=step_size, steps=steps, objective="kl", restarts=8,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(x_adv, expected, atol=1e-6, rtol=0)


def test_cw_follows_the_strongest_other_class():
    # z_2 leads z_1 by far, so that the attack on class 0 must go along w_2 − w_0, without regard to class 1.
    model, x = linear_model(5, classes=3), torch.full((1, 5), 0.5, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, -100.0, 0.0]))
    w = model[1].weight.detach()
    x_adv = pgd(model, x, torch.tensor([0]), eps=0.1, step_size=0.05, steps=5, objective="cw")
    torch.testing.assert_close(x_adv, x + 0.1 * (w[2] - w[0]).sign())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4),
    norm=st.sampled_from(sorted(BALLS)),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    start=st.sampled_from(["uniform", "wide", "normal"]),
    keep=st.sampled_from(["last", "worst"]),
    mode=st.sampled_from(["eval", "batch"]),
    eps=st.one_of(st.just(0.0), st.floats(1e-6, 20)),
    step_size=st.floats(0, 100),
    steps=st.integers(0, 3),
    restarts=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 100),
)
def test_stays_in_ball_and_box(n, norm, objective, start, keep, mode, eps, step_size, steps, restarts, dtype, seed):
    model, x = conv_model(seed).to(dtype), pixels(n, 2, 4, 4, seed=seed, dtype=dtype)
    x_adv = pgd(
        model, x, torch.arange(n) % 3, norm=norm, eps=eps, step_size=step_size, steps=steps, objective=objective,
        start=start, restarts=restarts, keep=keep, mode=mode,
    )  # fmt: skip
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert x_adv.amin() >= 0 and x_adv.amax() <= 1
    lengths = torch.linalg.vector_norm((x_adv - x).flatten(1), math.inf if norm == "Linf" else 2, dim=1)
    assert lengths.amax() <= eps * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("norm", BALLS)
def test_within_the_box_nothing_holds_the_steps_back_but_the_box(norm):
    model, x, y = linear_model(7), pixels(6, 7), torch.tensor([0, 1, 0, 1, 1, 0])
    x_adv = pgd(model, x, y, norm=norm, eps=0.01, step_size=9.0, steps=9, within="box")
    torch.testing.assert_close(x_adv, uphill(model, y).heaviside(torch.zeros(1, dtype=torch.float64)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(1e-3, 4), st.floats(-2, 4))
def test_l2_projection_is_nearest_point(seed, d, eps, log_scale):
    # The nearest point is clamp(x + s (at − x)) with s ≤ 1; s by root finding.
    x = pixels(1, d, seed=seed)
    move = torch.randn(1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**log_scale
    inside = np.clip((x + move).numpy(), 0, 1)
    if np.linalg.norm(inside - x.numpy()) > eps:
        inside = end_of_l2_ball(x.numpy(), move.numpy(), eps)
    np.testing.assert_allclose(BALLS["L2"].project(x + move, x, eps).numpy(), inside, atol=1e-9)


def test_l2_steps_follow_gradients_of_any_size():
    steepest = BALLS["L2"].steepest
    grad = torch.tensor([[3.0, -4.0]])
    for scale in (1e-40, 1e-30, 1.0, 1e30, 5e37):
        torch.testing.assert_close(steepest(grad * scale), torch.tensor([[0.6, -0.8]]), rtol=1e-3, atol=0)
    assert (steepest(torch.zeros(2, 3, 4)) == 0).all()


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_gradient_does_not_move(norm, objective):
    model, x = linear_model(4, scale=0.0), pixels(3, 4)
    run = {"norm": norm, "eps": 0.3, "objective": objective, "start": "normal"}
    start, end = (
        pgd(model, x, torch.tensor([0, 1, 0]), steps=k, generator=torch.Generator().manual_seed(0), **run)
        for k in (0, 5)
    )
    assert torch.isfinite(end).all()
    torch.testing.assert_close(end, start, atol=1e-12, rtol=0)


class Undefined(nn.Module):
    """Logits with a NaN or infinite gradient on the first pixel."""

    def forward(self, x):
        return torch.stack([(x[:, 0] - x[:, 0]).sqrt(), x[:, 1]], 1)


@pytest.mark.parametrize("norm", BALLS)
def test_gradient_that_is_not_finite_leaves_pixels_finite(norm):
    x = pixels(4, 2)
    x_adv = pgd(Undefined(), x, torch.zeros(4, dtype=torch.long), norm=norm, eps=0.1, step_size=0.1, steps=3)
    assert torch.isfinite(x_adv).all()


def snapshot(model: nn.Module) -> tuple:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [getattr(module, "track_running_stats", None) for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
    )


def model_in_odd_state() -> nn.Module:
    model = conv_model().train()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_model_is_left_as_found(mode, objective, grad_enabled):
    model, x = model_in_odd_state(), pixels(4, 2, 4, 4, dtype=torch.float32).requires_grad_(True)
    before, copied = snapshot(model), x.detach().clone()
    with torch.set_grad_enabled(grad_enabled):
        x_adv = pgd(model, x, torch.tensor([0, 1, 2, 0]), objective=objective, mode=mode)
        assert torch.is_grad_enabled() == grad_enabled
    assert not torch.equal(x_adv, x) and not x_adv.requires_grad
    assert x.requires_grad and x.grad is None and torch.equal(x, copied)
    state, *rest = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    torch.testing.assert_close(rest, list(before[1:]), atol=0, rtol=0)


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_frozen_gives_the_model_back_after_an_exception(batch_statistics):
    model = model_in_odd_state()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), frozen(model, batch_statistics=batch_statistics):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert [module.training for module in model.modules()] == [False, False, batch_statistics] + 4 * [False]
        model(pixels(4, 2, 4, 4, dtype=torch.float32))
        raise RuntimeError("inside")
    state, *rest = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    torch.testing.assert_close(rest, list(before[1:]), atol=0, rtol=0)


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("norm", BALLS)
def test_one_step_uses_the_statistics_of_the_mode(mode, norm):
    model, x, y = conv_model().double(), pixels(4, 2, 4, 4), torch.tensor([0, 1, 2, 0])
    model[1].running_mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model)
    reference.train(mode == "batch")
    reference[3].eval()
    at = x.clone().requires_grad_(True)
    F.cross_entropy(reference(at), y).backward()
    step = at.grad.sign() if norm == "Linf" else at.grad / at.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    x_adv = pgd(model, x, y, norm=norm, eps=1, step_size=0.01, steps=1, start="none", mode=mode)
    torch.testing.assert_close(x_adv, (x + 0.01 * step).clamp(0, 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", BALLS)
def test_generator_reproduces_and_is_the_only_source_of_chance(norm):
    model, x, y = conv_model(), pixels(4, 2, 4, 4, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
    global_state = torch.get_rng_state()
    first, again, other = (
        pgd(model, x, y, norm=norm, steps=1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_starts_have_their_distribution():
    model, x = linear_model(3), torch.full((20_000, 3), 0.5, dtype=torch.float64)
    y, generator = torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0)

    def moves(norm: str, start: str, within: str = "ball") -> torch.Tensor:
        return pgd(model, x, y, norm=norm, eps=0.2, steps=0, start=start, within=within, generator=generator) - x

    cube = moves("Linf", "uniform")
    assert cube.abs().amax() <= 0.2 and cube.mean().abs() < 0.002
    assert cube.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.02)
    wide = moves("Linf", "wide", within="box")
    assert 0.39 < wide.abs().amax() <= 0.4 and wide.mean().abs() < 0.004
    assert wide.std().item() == pytest.approx(0.4 / 3**0.5, rel=0.02)
    for start, radius in (("uniform", 0.2), ("wide", 0.4)):
        ball = moves("L2", start, within="box")
        assert ball.norm(dim=1).amax() <= radius and ball.mean(0).abs().amax() < 0.015 * radius
        for fraction in (0.3, 0.6, 0.9):  # a ball of a fraction r of the radius holds r³ of the volume
            share = (ball.norm(dim=1) < fraction * radius).double().mean().item()
            assert share == pytest.approx(fraction**3, abs=0.015)
    for norm in BALLS:
        assert moves(norm, "normal").std().item() == pytest.approx(0.001, rel=0.02)
        assert (moves(norm, "none") == 0).all()


@pytest.mark.parametrize("norm", BALLS)
def test_restarts_keep_the_worst_end_of_each_example(norm):
    model, x, y = conv_model().double().eval(), pixels(8, 2, 4, 4), torch.arange(8) % 3
    run = {"norm": norm, "eps": 0.5, "step_size": 0.2, "steps": 2, "objective": "cw"}
    generator = torch.Generator().manual_seed(0)
    ends = torch.stack([pgd(model, x, y, generator=generator, **run) for _ in range(4)])
    scores = torch.stack([OBJECTIVES["cw"](model(end), y, None) for end in ends])
    chosen = scores.argmax(0)
    assert len(chosen.unique()) > 1
    x_adv = pgd(model, x, y, restarts=4, generator=torch.Generator().manual_seed(0), **run)
    torch.testing.assert_close(x_adv, ends[chosen, torch.arange(8)])


class Hill(nn.Module):
    """Two classes; the objective on class 0 is highest at 0.6 and falls off on both sides. Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return torch.cat([(x - 0.6).abs(), torch.zeros_like(x)], 1)


def test_keep_worst_returns_the_highest_point_of_the_way():
    x, y = torch.tensor([[0.5], [0.1], [0.75]], dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    run = {"eps": 0.3, "step_size": 0.25, "steps": 4, "objective": "cw", "start": "none"}
    model = Hill()
    x_adv = pgd(model, x, y, keep="worst", **run)
    seen = torch.cat(model.seen, 1)
    assert seen.shape == (3, 5)
    nearest = seen.gather(1, (seen - 0.6).abs().argmin(1, keepdim=True))
    assert torch.equal(x_adv, nearest)
    assert torch.equal(pgd(model, x, y, keep="last", **run), seen[:, 4:])
    assert not torch.equal(nearest, seen[:, 4:])


@pytest.mark.parametrize("norm", BALLS)
def test_memory_layout_does_not_matter(norm):
    model, x, y = conv_model().double(), pixels(4, 2, 4, 4), torch.tensor([0, 1, 2, 0])
    expected = pgd(model, x, y, norm=norm, generator=torch.Generator().manual_seed(0))
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    for variant in (x.to(memory_format=torch.channels_last), strided):
        x_adv = pgd(model, variant, y, norm=norm, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x_adv, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n", [0, 1])
def test_smallest_batches(n, objective, norm):
    x, y = torch.rand(n, 2, 4, 4, requires_grad=True), torch.zeros(n, dtype=torch.long)
    x_adv = pgd(conv_model(), x, y, norm=norm, objective=objective)
    assert x_adv.shape == x.shape and torch.isfinite(x_adv).all() and not x_adv.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "L1"}, "unknown norm 'L1': choose from Linf, L2"),
        ({"objective": "mse"}, "unknown objective 'mse': choose from ce, cw, kl"),
        ({"start": "zero"}, "unknown start 'zero': choose from uniform, wide, normal, none"),
        ({"within": "cube"}, "unknown within 'cube': choose from ball, box"),
        ({"keep": "all"}, "unknown keep 'all': choose from last, worst"),
        ({"mode": "train"}, "unknown mode 'train': choose from eval, batch"),
        ({"eps": -0.1}, "eps must be finite and at least 0, got -0.1"),
        ({"eps": math.nan}, "eps must be finite and at least 0, got nan"),
        ({"step_size": math.inf}, "step_size must be finite and at least 0, got inf"),
        ({"steps": -1}, "steps must be finite and at least 0, got -1"),
        ({"restarts": 0}, "restarts must be finite and at least 1, got 0"),
        ({"objective": "kl", "start": "none"}, "no gradient at x itself"),
        ({"x": torch.full((2, 4), 1.5)}, r"x must lie in \[0, 1\]"),
        ({"x": torch.full((2, 4), math.nan)}, r"x must lie in \[0, 1\]"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"got \(2, 4\) and \(3,\)"),
    ],
)
def test_errors_name_the_value(arguments, message):
    inputs = {"x": torch.rand(2, 4), "y": torch.zeros(2, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        pgd(linear_model(4).float(), **inputs)
