"""Margins and boundary points against closed forms, linear programs and finite differences, mostly in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from dyart import margin as margin_module
from dyart.dynamics import refined_margin
from dyart.losses import TRAINING_STEPS
from dyart.margin import (
    MAX_GRADIENT_WEIGHT,
    SEARCHES,
    Boundary,
    approach_boundary,
    find_boundary,
    is_locally_closest,
    logit_margin,
    margin_gradient_weights,
    soft_logit_margin,
)

DUAL = {"Linf": 1, "L2": 2}
ORDER = {"Linf": math.inf, "L2": 2}


def linear(weight, bias):
    weight, bias = torch.as_tensor(weight), torch.as_tensor(bias)
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype))
    model[1].weight.data, model[1].bias.data = weight, bias
    return model


def random_linear(classes, pixels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, pixels, generator=generator, dtype=torch.float64)
    return linear(weight, 0.1 * torch.randn(classes, generator=generator, dtype=torch.float64))


def images(n, *shape, low=0.3, high=0.7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def conv_net():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.Conv2d(6, 6, 3, stride=2), nn.Softplus()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4)).double()


def conv_with_state():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 5)
    )


def steepened(model, factor=4):
    """The model with larger weights, so that margins are short beside the box and Φ bends on the way."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor if parameter.dim() > 1 else 1
    return model


# --- Logit margins ----------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(
    st.integers(2, 12).flatmap(
        lambda c: st.tuples(st.lists(st.floats(-50, 50), min_size=c, max_size=c), st.integers(0, c - 1))
    ),
    st.floats(0.01, 1000),
)
def test_soft_margin_is_between_the_bounds(logits_and_label, temperature):
    logits, label = torch.tensor([logits_and_label[0]], dtype=torch.float64), torch.tensor([logits_and_label[1]])
    hard, soft = logit_margin(logits, label).item(), soft_logit_margin(logits, label, temperature).item()
    others = [z for k, z in enumerate(logits_and_label[0]) if k != label]
    assert hard == logits_and_label[0][label] - max(others)
    assert hard - math.log(len(others)) / temperature - 1e-9 <= soft <= hard + 1e-9
    expected = math.fsum(math.exp(temperature * (z - max(others))) for z in others)
    assert soft == pytest.approx(hard - math.log(expected) / temperature, abs=1e-9)


def test_infinite_temperature_is_the_logit_margin():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    assert torch.equal(soft_logit_margin(logits, labels, math.inf), logit_margin(logits, labels))


def test_margins_of_half_precision_logits_are_taken_in_float32():
    logits, labels = torch.randn(50, 10).bfloat16(), torch.arange(50) % 10
    for function in (logit_margin, soft_logit_margin):
        assert torch.equal(function(logits, labels), function(logits.float(), labels))


@pytest.mark.parametrize("temperature", [0.0, -5.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        soft_logit_margin(torch.zeros(1, 2), torch.tensor([0]), temperature)


# --- Boundary points of linear classifiers ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 6])
@pytest.mark.parametrize("search", list(SEARCHES))
def test_linear_classifier_exact_boundary(classes, norm, search):
    """R = min_k (z_y − z_k) / ‖w_y − w_k‖_q, and x̂ = x − R · (the unit move against w_y − w_k), away from the box.

    With more than two classes a descent can end on a face that is not the nearest. It does not where the class with the
    second largest logit is also the nearest one.
    """
    model, x = random_linear(classes, 12), images(60, 3, 2, 2)
    logits = model(x).detach()
    y = logits.argmax(1)
    weight = model[1].weight.detach()
    difference = weight[y][:, None] - weight
    margins = (logits.gather(1, y[:, None]) - logits) / torch.linalg.vector_norm(difference, DUAL[norm], dim=2)
    expected, nearest = margins.scatter(1, y[:, None], math.inf).min(1)
    inside = (expected < 0.29) & (nearest == logits.scatter(1, y[:, None], -math.inf).argmax(1))
    assert inside.sum() > 20

    options = {"temperature": math.inf, "steps": 200, "init_radius": 0.0}
    boundary = find_boundary(model, x, y, norm=norm, search=search, **options)
    assert boundary.found.all()
    ratio = boundary.margin / expected
    # A search ends a little beyond the boundary: the released one by 5 % of its last move, if it never steps back.
    assert (ratio >= 1).all()
    assert (ratio[inside] < {"fast": 1.0003, "fab": 1.0501}[search]).all()
    normal = difference[torch.arange(60), nearest]
    unit = normal.sign() if norm == "Linf" else normal / normal.norm(dim=1, keepdim=True)
    closest = x.flatten(1) - expected[:, None] * unit
    error = (boundary.x.flatten(1) - closest).abs().amax(1) / expected
    assert (error[inside] < {"fast": 1e-3, "fab": 0.06}[search]).all()
    torch.testing.assert_close(boundary.grad.flatten(1)[inside], normal[inside])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_default_steps_suffice_for_linear_classifiers(norm):
    model, x = random_linear(2, 12), images(60, 3, 2, 2)
    y = model(x).argmax(1)
    difference = model[1].weight[0] - model[1].weight[1]
    expected = logit_margin(model(x), y) / torch.linalg.vector_norm(difference, DUAL[norm])
    boundary = find_boundary(model, x, y, norm=norm)
    inside = expected < 0.29
    assert boundary.found[inside].all()
    assert (boundary.margin / expected)[inside].max() < 1.01


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_linear_classifier_soft_boundary(norm):
    """Where the other classes share their weights, log-sum-exp is linear too: Φ_β = (w_y − u)·x + b_y − lse(βb)/β."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 12, generator=generator, dtype=torch.float64).repeat(4, 1)
    weight[2] = torch.randn(12, generator=generator, dtype=torch.float64)
    bias = torch.tensor([0.1, -0.2, 0.0, 0.15], dtype=torch.float64)
    model, x = linear(weight, bias), images(100, 12)
    bias[2] = 0.6 - (x @ (weight[2] - weight[0])).mean()
    y = torch.full((100,), 2)
    value = x @ (weight[2] - weight[0]) + bias[2] - torch.logsumexp(3 * bias[[0, 1, 3]], 0) / 3
    expected = value / torch.linalg.vector_norm(weight[2] - weight[0], DUAL[norm])
    inside = (expected > 0) & (expected < 0.29)
    assert inside.sum() > 10

    boundary = find_boundary(model, x, y, norm=norm, temperature=3.0, steps=200)
    torch.testing.assert_close(boundary.margin[inside], expected[inside], rtol=3e-4, atol=0)
    assert (boundary.value[inside] < 0).all()
    exact = find_boundary(model, x, y, norm=norm, temperature=math.inf, steps=200)
    assert (boundary.margin <= exact.margin + 1e-9)[inside].all()


def test_linear_classifier_at_the_faces_of_the_box():
    """With pixels at 0 and 1, where the closed form does not hold, the margin is that of a linear program."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.choice([0.0, 1.0, 0.02, 0.9], size=(25, 8)))
    model = random_linear(2, 8, seed=4)
    y = model(x).argmax(1)
    boundary = find_boundary(model, x, y, steps=200)
    normal = (model[1].weight[1] - model[1].weight[0]).detach().numpy()
    offset = (model[1].bias[1] - model[1].bias[0]).item()
    for i in range(len(x)):
        sign = 1 if y[i] == 0 else -1  # Φ falls to 0 where sign · (normal·x + offset) rises to 0
        identity, ones = np.eye(8), np.ones((8, 1))
        program = linprog(
            [0] * 8 + [1],
            A_ub=np.block([[identity, -ones], [-identity, -ones], [-sign * normal, np.zeros(1)]]),
            b_ub=[0] * 16 + [sign * (normal @ x[i].numpy() + offset)],
            bounds=[(-pixel, 1 - pixel) for pixel in x[i].tolist()] + [(0, None)],
        )
        assert boundary.found[i] == program.success
        if program.success:
            assert boundary.margin[i].item() == pytest.approx(program.fun, rel=1e-3)
        else:
            assert torch.equal(boundary.x[i], x[i])


# --- What holds for every model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_is_returned(search, norm):
    model, x = steepened(conv_net()), images(30, 3, 4, 4, low=0.0, high=1.0)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    boundary = find_boundary(model, x, y, search=search, norm=norm)

    correct = soft_logit_margin(model(x), y) > 1e-9
    assert 0 < boundary.found.sum() < 30
    assert not boundary.found[~correct].any()
    assert boundary.x.shape == boundary.grad.shape == x.shape
    assert ((boundary.x >= 0) & (boundary.x <= 1)).all()
    distance = torch.linalg.vector_norm((boundary.x - x).flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(boundary.margin, distance)
    assert torch.equal(boundary.x[~boundary.found], x[~boundary.found])
    at = boundary.x.clone().requires_grad_(True)
    value = soft_logit_margin(model(at), y)
    torch.testing.assert_close(boundary.value, value.detach())
    assert (boundary.value[boundary.found] < 0).all()
    torch.testing.assert_close(boundary.grad, torch.autograd.grad(value.sum(), at)[0])
    assert not any(field.requires_grad for field in boundary)


@pytest.mark.parametrize("search", list(SEARCHES))
def test_examples_do_not_depend_on_each_other(search):
    """The released code mixes a whole batch with the weight of its first example; here each has its own."""
    model, x = steepened(mlp()), images(12, 12, low=0.0, high=1.0)
    y = model(x).argmax(1)
    together = find_boundary(model, x, y, search=search, steps=5, init_radius=0.0)
    assert together.found.sum() > 5
    for i in range(12):
        alone = find_boundary(model, x[i : i + 1], y[i : i + 1], search=search, steps=5, init_radius=0.0)
        for field, single in zip(together, alone, strict=True):
            torch.testing.assert_close(field[i : i + 1], single)


def test_fab_is_the_released_recipe():
    """One example, step by step, in plain numbers."""
    model = steepened(mlp())
    for x in images(4, 12, low=0.0, high=1.0):
        y = model(x[None]).argmax(1)

        def phi(at, y=y):
            at = at.clone().requires_grad_(True)
            value = soft_logit_margin(model(at[None]), y)[0]
            return value.item(), torch.autograd.grad(value, at)[0]

        def project(at, normal, gain):
            return margin_module.lookup_norm("Linf").project(at[None], normal[None], torch.tensor([gain]).double())[0]

        at, best = x, math.inf
        for _ in range(7):
            value, grad = phi(at)
            d1 = project(at, grad, -value)
            d2 = project(x, grad, -value - (grad @ (x - at)).item())
            a = min((d1.abs().max() / (d1.abs().max() + d2.abs().max())).item(), 0.1)
            at = ((1 - a) * (at + 1.05 * d1) + a * (x + 1.05 * d2)).clamp(0, 1)
            if phi(at)[0] < 0:
                best = min(best, (at - x).abs().max().item())
                at = x + 0.9 * (at - x)
        boundary = find_boundary(model, x[None], y, search="fab", steps=7, init_radius=0.0)
        assert boundary.margin.item() == pytest.approx(best if math.isfinite(best) else 0, rel=1e-6)


def test_fast_comes_closer_than_fab_in_a_third_of_its_steps():
    model, x = steepened(conv_net()), images(60, 3, 4, 4)
    y = model(x).argmax(1)
    fast, fab = (find_boundary(model, x, y, search=name, steps=TRAINING_STEPS[name]) for name in ("fast", "fab"))
    assert TRAINING_STEPS["fab"] == SEARCHES["fab"][1] >= 3 * TRAINING_STEPS["fast"]
    assert fast.found.sum() >= fab.found.sum() > 20
    both = fast.found & fab.found
    assert (fast.margin / fab.margin)[both].mean() < 1


@pytest.mark.parametrize("search", list(SEARCHES))
def test_start_is_reproducible_and_as_wide_as_asked(search, monkeypatch):
    starts = []
    real = margin_module._noisy_start
    monkeypatch.setattr(margin_module, "_noisy_start", lambda *args: starts.append(real(*args)) or starts[-1])
    model, x = mlp(), images(8, 12)
    y = model(x).argmax(1)
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        find_boundary(model, x, y, search=search, init_radius=0.1, generator=generator)
    first, again, other = starts
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close((first - x).abs().amax(1), torch.full((8,), 0.05).double())


# --- Degenerate input -------------------------------------------------------------------------------------------------


def assert_finite(boundary):
    assert all(field.isfinite().all() for field in boundary)
    assert margin_gradient_weights(boundary).isfinite().all()


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("norm", ["Linf", "L2"])
class TestDegenerateInput:
    def test_no_example_is_correct(self, search, norm):
        model, x = mlp(), images(5, 12)
        boundary = find_boundary(model, x, (model(x).argmax(1) + 1) % 4, search=search, norm=norm)
        assert not boundary.found.any()
        assert torch.equal(boundary.x, x)
        assert (boundary.margin == 0).all()
        assert_finite(boundary)

    def test_no_boundary_exists(self, search, norm):
        """Logits that differ by more than any move in the box can change."""
        model = linear(torch.ones(3, 4) * 0.01, torch.tensor([9.0, 0.0, 0.0]))
        boundary = find_boundary(model, torch.rand(5, 4), torch.zeros(5, dtype=torch.long), search=search, norm=norm)
        assert not boundary.found.any()
        assert_finite(boundary)

    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_gradient_is_zero(self, search, norm):
        model = linear(torch.zeros(3, 4), torch.tensor([1.0, 0.0, 0.0]))
        x, y = torch.rand(5, 4), torch.zeros(5, dtype=torch.long)
        with torch.autograd.detect_anomaly():  # no NaN goes through the network, either
            boundary = find_boundary(model, x, y, search=search, norm=norm)
        assert not boundary.found.any()
        assert_finite(boundary)

    def test_one_example_and_none(self, search, norm):
        model, x = random_linear(2, 12), images(1, 12)
        y = model(x).argmax(1)
        assert find_boundary(model, x, y, search=search, norm=norm).found.all()
        nothing = find_boundary(model, x[:0], y[:0], search=search, norm=norm)
        assert nothing.x.shape == nothing.grad.shape == (0, 12)
        assert nothing.found.shape == nothing.margin.shape == (0,)
        assert nothing.found.dtype == torch.bool

    def test_memory_layout_does_not_matter(self, search, norm):
        model, x = steepened(conv_net()), images(6, 3, 4, 4)
        y = model(x).argmax(1)
        options = {"search": search, "norm": norm, "init_radius": 0.0}
        expected = find_boundary(model, x, y, **options)
        strided = torch.stack([x, x], 1)[:, 1]
        assert not strided.is_contiguous()
        for same in (strided, x.contiguous(memory_format=torch.channels_last)):
            for field, other in zip(expected, find_boundary(model, same, y, **options), strict=True):
                torch.testing.assert_close(field, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    model, x = conv_net().to(dtype), images(4, 3, 4, 4).to(dtype)
    boundary = find_boundary(model, x, model(x).argmax(1))
    assert {field.dtype for field in boundary} == {dtype, torch.bool}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "unknown norm 'L1': choose from Linf, L2"),
        ({"search": "best"}, "unknown search 'best': choose from fast, fab"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must have shape \(2,\) to fit x, got \(3,\)"),
        ({"x": torch.full((2, 12), 1.01)}, r"x must lie in \[0, 1\]"),
        ({"x": torch.full((2, 12), math.nan)}, r"x must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"x": torch.rand(2, 12), "labels": torch.zeros(2, dtype=torch.long)} | options
    with pytest.raises(ValueError, match=message):
        find_boundary(mlp().float(), **arguments)


# --- Points that are good enough to train on --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_approach_ends_on_the_boundary_of_a_linear_classifier(norm, steps):
    model, x = random_linear(2, 12), images(20, 12)
    y = model(x).argmax(1)
    y[::4] = 1 - y[::4]
    reference = find_boundary(model, x, y, norm=norm, steps=50)
    boundary = approach_boundary(model, x, y, norm=norm, steps=steps)
    assert torch.equal(boundary.found, reference.found) and boundary.found.sum() == 15
    torch.testing.assert_close(boundary.margin, reference.margin, rtol=2e-3, atol=0)  # the fast search ends beyond
    torch.testing.assert_close(boundary.x, reference.x, rtol=2e-3, atol=1e-4)
    value = soft_logit_margin(model(boundary.x), y)
    torch.testing.assert_close(value[boundary.found], torch.zeros(15, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(boundary.x[~boundary.found], x[~boundary.found])
    assert (boundary.margin[~boundary.found] == 0).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_approach_comes_nearer_with_every_linearization(norm):
    model, x = steepened(mlp()), images(200, 12)
    y = model(x).argmax(1)
    margin = find_boundary(model, x, y, norm=norm, steps=100).margin
    off, missed = [], []
    for steps in (1, 2, 4, 8):
        boundary = approach_boundary(model, x, y, norm=norm, steps=steps)
        found = boundary.found & (margin > 0)
        assert found.sum() > 150
        off.append((boundary.margin / margin - 1).abs()[found].mean().item())
        missed.append(soft_logit_margin(model(boundary.x), y)[found].abs().mean().item())
    assert off == sorted(off, reverse=True) and missed == sorted(missed, reverse=True)
    assert off[-1] < 0.05 < off[0]


def test_approach_says_where_its_last_linearization_was():
    model, x = steepened(mlp()), images(20, 12)
    y = model(x).argmax(1)
    boundary = approach_boundary(model, x, y)
    pixels = x.clone().requires_grad_(True)
    value = soft_logit_margin(model(pixels), y)
    (grad,) = torch.autograd.grad(value.sum(), pixels)
    assert boundary.found.sum() > 10
    torch.testing.assert_close(boundary.value[boundary.found], value[boundary.found].detach())
    torch.testing.assert_close(boundary.grad[boundary.found], grad[boundary.found])


def test_approach_is_among_those_it_is_told():
    model, x = steepened(mlp()), images(20, 12)
    y, seen = model(x).argmax(1), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    among = torch.arange(20) < 8
    whole, part = approach_boundary(model, x, y), approach_boundary(model, x, y, among=among)
    assert seen == [20, 8]
    assert torch.equal(part.found, whole.found & among) and part.found.any()
    for mine, others in zip(part, whole, strict=True):
        torch.testing.assert_close(mine[part.found], others[part.found])
    assert not approach_boundary(model, x, y, among=torch.zeros(20, dtype=torch.bool)).found.any()


def test_approach_leaves_out_what_has_no_gradient():
    model = linear(torch.zeros(2, 12), torch.tensor([1.0, 0.0]))
    boundary = approach_boundary(model, torch.rand(5, 12), torch.zeros(5, dtype=torch.long))
    assert not boundary.found.any()
    assert all(field.isfinite().all() for field in boundary)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_approach_takes_more_linearizations_where_a_margin_lies_within_reach_and_is_not_near(norm, monkeypatch):
    model, x = steepened(mlp()), images(200, 12)
    y, seen = model(x).argmax(1), []
    first = approach_boundary(model, x, y, norm=norm, steps=1)
    options = {"norm": norm, "steps": 3, "reach": first.margin[first.found].median().item()}
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    boundary = approach_boundary(model, x, y, **options)
    again = (first.margin > options["reach"] / 8) & (first.margin < 2 * options["reach"])
    assert (first.found & ~again).sum() > 10 and torch.equal(boundary.x[~again], first.x[~again])

    monkeypatch.setattr("dyart.margin.WORTH_ANOTHER", ((1 / 8, 2.0), (1.0, 0.0)))
    second = approach_boundary(model, x, y, **options)
    third = again & (second.margin > options["reach"] / 8) & (second.margin < 1.25 * options["reach"])
    assert seen == [200, again.sum(), third.sum(), 200, again.sum()] and 10 < third.sum() < again.sum() - 10
    assert torch.equal(boundary.x[again & ~third], second.x[again & ~third])
    assert (boundary.x != second.x).flatten(1).any(1)[third].float().mean() > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L1"}, "unknown norm 'L1'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"reach": 0.0}, "reach must be positive and finite, got 0.0"),
        ({"reach": math.inf}, "reach must be positive and finite, got inf"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels must have shape \(2,\) to fit x, got \(3,\)"),
        ({"x": torch.full((2, 12), 1.01)}, r"x must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_of_approach_are_named(options, message):
    arguments = {"x": torch.rand(2, 12), "labels": torch.zeros(2, dtype=torch.long)} | options
    with pytest.raises(ValueError, match=message):
        approach_boundary(mlp().float(), **arguments)


# --- The model is left as it was, wherever the search is called from --------------------------------------------------


def searched(search, model, x, y, **options):
    """The boundary points of any search: a name in SEARCHES, or "approach"."""
    return (
        approach_boundary(model, x, y) if search == "approach" else find_boundary(model, x, y, search=search, **options)
    )


@pytest.mark.parametrize("search", [*SEARCHES, "approach"])
def test_model_is_left_exactly_as_it_was(search):
    model = conv_with_state().train()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    x, y = torch.rand(6, 3, 4, 4), torch.arange(6) % 5
    model(x).sum().backward()
    weights = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    batches = model[1].num_batches_tracked.item()

    searched(search, model, x, y)
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert model[1].num_batches_tracked.item() == batches
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    model[0].weight.data.zero_()  # and no graph holds on to the parameters


@pytest.mark.parametrize("search", [*SEARCHES, "approach"])
def test_search_is_the_same_in_eval_mode_and_without_gradients(search):
    model, x = steepened(conv_with_state(), 2), torch.rand(6, 3, 4, 4)
    for _ in range(3):
        model(torch.rand(50, 3, 4, 4))
    model.eval()
    y = model(x).argmax(1)
    expected = searched(search, model, x, y, init_radius=0.0)
    assert expected.found.any()
    model.train()
    with torch.no_grad():
        actual = searched(search, model, x, y, init_radius=0.0)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("search", list(SEARCHES))
def test_search_in_bfloat16(search):
    """Boundary, norms and decisions stay in float32, and the points come close to those of float32."""
    model, x = steepened(conv_with_state(), 3).eval(), torch.rand(40, 3, 4, 4)
    y = model(x).argmax(1)
    options = {"search": search, "init_radius": 0.0}
    expected = find_boundary(model, x, y, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = find_boundary(model, x, y, **options)
    assert {field.dtype for field in actual} == {torch.float32, torch.bool}
    both = expected.found & actual.found
    assert both.sum() > 0.9 * expected.found.sum() > 20
    assert (actual.margin / expected.margin)[both].median() == pytest.approx(1, abs=0.03)


def test_search_of_a_compiled_model():
    """torch.compile's tracing and guards, without a compiler: the search changes modes and flags under its feet."""
    model, x = conv_with_state().eval(), torch.rand(8, 3, 4, 4)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    expected = find_boundary(model, x, y)
    model.compile(backend="eager")
    for training in (True, False):
        model.train(training)
        for field, other in zip(expected, find_boundary(model, x, y), strict=True):
            torch.testing.assert_close(field, other)
        assert model.training == training


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fixed_shapes_of_accelerators_give_the_same_points(norm, monkeypatch):
    """On an accelerator all rows are searched, with a fixed number of projection steps."""
    model, x = steepened(conv_net()), images(30, 3, 4, 4, low=0.0, high=1.0)
    y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    expected = find_boundary(model, x, y, norm=norm)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("dyart.search.has_fixed_shapes", lambda x: True)
    monkeypatch.setattr("dyart.projection.has_fixed_shapes", lambda x: True)
    for field, other in zip(expected, find_boundary(model, x, y, norm=norm), strict=True):
        torch.testing.assert_close(field, other)
    assert set(sizes) == {30}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronization exists only with a GPU")
def test_search_loop_does_not_wait_for_the_gpu():
    model, x = conv_with_state().cuda().eval(), torch.rand(8, 3, 4, 4, device="cuda")
    y = model(x).argmax(1)
    find_boundary(model, x, y)
    # The check of the pixels at the door waits once; what follows the first pass through the network may not.
    hook = model.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    try:
        find_boundary(model, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()


# --- The margin gradient ----------------------------------------------------------------------------------------------


def exact_margin(model, x, y, norm):
    """R, with the little that the search ends beyond the boundary taken off to first order; and the boundary."""
    boundary = find_boundary(model, x, y, norm=norm, steps=400)
    assert boundary.found.all()
    return boundary.margin + boundary.value * margin_gradient_weights(boundary, norm), boundary


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("network", [mlp, conv_net])
def test_margin_gradient_is_that_of_the_margin_found_again(network, norm):
    model = steepened(network())
    x = images(200, 3, 4, 4) if network is conv_net else images(40, 12)
    y = model(x).argmax(1)
    near = find_boundary(model, x, y, norm=norm, steps=3)
    rows = (near.found & (near.margin < 0.25)).nonzero()[:6, 0]
    assert len(rows) == 6
    x, y = x[rows], y[rows]
    _, boundary = exact_margin(model, x, y, norm)
    weights = margin_gradient_weights(boundary, norm)

    torch.manual_seed(5)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    direction = {name: torch.randn_like(value) for name, value in start.items()}
    surrogate = []
    for value in weights * soft_logit_margin(model(boundary.x), y):
        gradient = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        surrogate.append(sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True)))
    step, found_again = 1e-4, []
    for sign in (1, -1):
        model.load_state_dict({name: value + sign * step * direction[name] for name, value in start.items()})
        found_again.append(exact_margin(model, x, y, norm)[0])
    differences = (found_again[0] - found_again[1]) / (2 * step)
    torch.testing.assert_close(
        torch.stack(surrogate), differences, rtol=0.01, atol=1e-3 * differences.abs().max().item()
    )


def boundary_of(x, moved, grad, value=-0.1, found=True):
    n = len(x)
    margin = (moved - x).flatten(1).abs().amax(1)
    return Boundary(moved, torch.full((n,), found), margin, torch.full((n,), value), grad)


def test_margin_gradient_weights():
    grad = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-5, 0.0], [3.0, -4.0]])
    boundary = boundary_of(torch.zeros(4, 2), torch.zeros(4, 2), grad)
    boundary = boundary._replace(found=torch.tensor([True, True, True, False]))
    assert MAX_GRADIENT_WEIGHT == 1e3
    torch.testing.assert_close(margin_gradient_weights(boundary), torch.tensor([1 / 7, 1e3, 1e3, 0]))
    torch.testing.assert_close(margin_gradient_weights(boundary, "L2"), torch.tensor([1 / 5, 1e3, 1e3, 0]))
    with pytest.raises(ValueError, match="unknown norm"):
        margin_gradient_weights(boundary, "L1")


# --- The quality filter -----------------------------------------------------------------------------------------------


def filtered(move, grad, norm="Linf", x=0.5, **fields):
    """The filter's verdict on one example."""
    move, grad = torch.tensor([move]), torch.tensor([grad])
    x = torch.full_like(move, x) if isinstance(x, float) else torch.tensor([x])
    return is_locally_closest(x, boundary_of(x, x + move, grad, **fields), norm).item()


def test_filter_takes_points_just_beyond_the_boundary_only():
    move, grad = [0.1, -0.1], [-1.0, 1.0]
    assert filtered(move, grad, value=-0.29)
    assert not filtered(move, grad, value=-0.31)
    assert not filtered(move, grad, value=0.01)
    assert not filtered(move, grad, value=-0.1, found=False)


def test_linf_filter_wants_the_gradient_against_the_move_where_it_is_long():
    move = [0.1] * 20
    assert filtered(move, [-1.0] * 19 + [1.0])  # 0.95 of the coordinates
    assert not filtered(move, [-1.0] * 18 + [1.0] * 2)  # 0.9 of them, no more
    assert not filtered(move, [-1e-7] * 20)  # δ · ∂Φ = -1e-8 is too close to 0
    # Coordinates that moved by 0.8 of the longest or less may have any sign.
    assert filtered([0.1] * 10 + [0.0799] * 10, [-1.0] * 10 + [1.0] * 9 + [0.0])
    assert not filtered([0.1] * 10 + [0.0801] * 10, [-1.0] * 10 + [1.0] * 9 + [0.0])


def test_linf_filter_wants_a_flat_coordinate_among_the_short_moves():
    move = [0.1, 0.0, 0.0]
    assert filtered(move, [-1.0, 0.2, 0.1])
    assert not filtered(move, [-1.0, 0.2, -0.11])


def test_l2_filter_wants_the_move_along_the_gradient_where_the_box_leaves_it_free():
    assert filtered([0.08, 0.06], [-4.0, -3.0], "L2")
    assert filtered([0.08, 0.06], [-4.0, 0.0], "L2", x=0.5) is False  # cosine 0.8, no more
    # At a face of the box, a gradient that pulls further out does not count; one that pulls inwards does.
    assert filtered([0.1, 0.0], [-1.0, 9.0], "L2", x=[0.5, 0.0])
    assert not filtered([0.1, 0.0], [-1.0, -9.0], "L2", x=[0.5, 0.0])
    assert filtered([0.1, 0.0], [-1.0, -9.0], "L2", x=[0.5, 1.0])
    assert not filtered([0.1, 0.0], [-1.0, 9.0], "L2", x=[0.5, 1.0])


def test_filter_agrees_with_the_linear_truth():
    """Converged points of linear classifiers pass; the same points with their moves reversed do not."""
    for norm in ("Linf", "L2"):
        model, x = random_linear(2, 12), images(40, 12)
        boundary = find_boundary(model, x, model(x).argmax(1), norm=norm, steps=100)
        assert is_locally_closest(x, boundary, norm).all()
        assert not is_locally_closest(2 * boundary.x - x, boundary, norm).any()


class Strip(nn.Module):
    """Class 0 between two boundaries, at 0.4 and 0.7 of the first coordinate."""

    def forward(self, x):
        first = x[:, 0]
        return torch.stack([torch.zeros_like(first), first - 0.7, 0.4 - first], 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("search", ["fast", "fab"])
@pytest.mark.parametrize(("at", "margin"), [(None, 0.12), (0.45, 0.12), (0.69, 0.18)])
def test_a_search_ends_at_the_boundary_that_it_starts_near(norm, search, at, margin):
    x = torch.tensor([[0.52, 0.5], [0.52, 0.1]], dtype=torch.float64)
    start = None if at is None else torch.tensor([[at, 0.5], [at, 0.1]], dtype=torch.float64)
    kind = {"norm": norm, "search": search, "temperature": math.inf, "init_radius": 0.0}
    boundary = find_boundary(Strip(), x, torch.zeros(2, dtype=torch.int64), start=start, **kind)
    assert boundary.found.all()
    torch.testing.assert_close(boundary.margin, torch.full((2,), margin).double(), rtol=0.06, atol=0)


def test_a_start_must_have_the_shape_of_x():
    with pytest.raises(ValueError, match=r"start must have the shape of x, \(2, 2\), got \(2, 3\)"):
        find_boundary(Strip(), torch.rand(2, 2), torch.zeros(2, dtype=torch.int64), start=torch.rand(2, 3))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("network", [mlp, conv_net])
def test_a_search_from_boundary_points_goes_on_from_there(network, norm):
    """Where the boundary bends, first steps of full weight end further off: up to 19 % here, for 2 % to 13 % of all."""
    model = steepened(network(), 32)
    x = images(60, 3, 4, 4, low=0.0, high=1.0) if network is conv_net else images(60, 12, low=0.0, high=1.0)
    y = model(x).argmax(1)
    first = find_boundary(model, x, y, norm=norm, steps=40)
    second = find_boundary(model, x, y, norm=norm, steps=40, start=first.x)
    assert first.found.all() and second.found.all()
    ratio = refined_margin(x, second, norm) / refined_margin(x, first, norm)
    assert ratio.max() < 1.01
    assert (ratio > 1 + 1e-4).double().mean() < 0.02
    assert (ratio < 1 - 1e-5).double().mean() > 0.1
