"""The minimum-norm attack against closed forms, and what it says where it finds nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from dyart import minimum_norm as module
from dyart.margin import find_boundary
from dyart.minimum_norm import HAIR, closest_boundary, minimum_norm_attack, plan_of

DUAL = {"Linf": 1, "L2": 2}


def linear(classes=5, pixels=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes, dtype=torch.float64))
    model[1].weight.data = torch.randn(classes, pixels, generator=generator, dtype=torch.float64)
    model[1].bias.data = 0.1 * torch.randn(classes, generator=generator, dtype=torch.float64)
    return model


def images(n=24, pixels=12, seed=1):
    return 0.45 + 0.1 * torch.rand(n, 1, 3, pixels // 3, generator=torch.Generator().manual_seed(seed)).double()


def class_distances(model, x, y, norm):
    """The distance of each class's hyperplane, away from the box; inf for the label. (n, C)"""
    weight, bias = model[1].weight, model[1].bias
    logits = x.flatten(1) @ weight.T + bias
    steep = torch.linalg.vector_norm(weight[y][:, None] - weight, DUAL[norm], dim=2)
    distances = (logits.gather(1, y[:, None]) - logits) / steep
    return distances.scatter(1, y[:, None], math.inf).detach()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("passes", [5, 20, 100])
def test_linear_classifier_nearest_of_all_classes(norm, passes):
    model, x = linear(), images()
    y = model(x).argmax(1)
    found = minimum_norm_attack(model, x, y, norm=norm, passes=passes)
    expected = class_distances(model, x, y, norm).amin(1)
    assert found.found.all()
    torch.testing.assert_close(found.distance, expected, rtol=1e-3, atol=1e-5)
    assert (found.distance >= expected).all()
    assert (model(found.x).argmax(1) != y).all()
    assert ((found.x >= 0) & (found.x <= 1)).all()
    length = torch.linalg.vector_norm((found.x - x).flatten(1), {"Linf": math.inf, "L2": 2}[norm], dim=1)
    torch.testing.assert_close(found.distance, length)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_targeted_examples_are_of_the_class_asked_for(norm):
    model, x = linear(3), images()
    clean = model(x).argmax(1)
    target = (clean + 1) % 3
    target[0] = clean[0]
    found = minimum_norm_attack(model, x, target, norm=norm, passes=40, targeted=True)
    assert (model(found.x).argmax(1) == target)[found.found].all() and found.found.float().mean() > 0.9
    assert found.distance[0] == 0 and torch.equal(found.x[0], x[0])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_targeted_distance_of_two_classes(norm):
    model, x = linear(2), images()
    clean = model(x).argmax(1)
    found = minimum_norm_attack(model, x, 1 - clean, norm=norm, targeted=True)
    expected = class_distances(model, x, clean, norm).amin(1)
    torch.testing.assert_close(found.distance, expected, rtol=1e-3, atol=1e-5)


def test_misclassified_images_are_returned_unchanged():
    model, x = linear(), images()
    y = model(x).argmax(1)
    y[::2] = (y[::2] + 1) % 5
    found = minimum_norm_attack(model, x, y)
    assert torch.equal(found.x[::2], x[::2]) and (found.distance[::2] == 0).all() and found.found.all()
    assert (found.distance[1::2] > 0).all()
    found.x.detach_().add_(1)  # its own, and no view
    assert x.max() < 1
    found = minimum_norm_attack(model, x, y)
    alone = minimum_norm_attack(model, x[1:2], y[1:2])
    torch.testing.assert_close(alone.x, found.x[1:2])


class TwoValleys(nn.Module):
    """Three classes: at x the runner-up's logit is flat and its boundary far, that of the third is steep and near."""

    def forward(self, x):
        first = x[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(first), (first - 0.5) - 0.3, 10 * (0.5 - first) - 0.4], 1)


def test_the_nearest_boundary_need_not_be_the_runner_ups():
    x, y = torch.full((1, 1, 2, 2), 0.5).double(), torch.zeros(1, dtype=torch.int64)
    assert find_boundary(TwoValleys(), x, y, temperature=math.inf).margin.item() == pytest.approx(0.3, rel=0.1)
    for passes in (4, 10, 40, 100):
        found = minimum_norm_attack(TwoValleys(), x, y, passes=passes)
        assert found.distance.item() == pytest.approx(0.04, rel=1e-2)
        boundary = closest_boundary(TwoValleys(), x, y, passes=passes)
        assert boundary.margin.item() == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
@pytest.mark.parametrize("passes", [2, 3, 7, 10, 20, 40, 100, 1000])
def test_a_plan_spends_the_passes_that_it_is_given(passes, most):
    plan = plan_of(passes, most)
    forward, backward = plan.passes()
    assert backward == passes >= forward
    assert plan.first >= 1 and min(plan) >= 0
    assert max(plan.looked_at, plan.looked_at_again) <= most


@pytest.mark.parametrize(("passes", "classes"), [(2, 5), (10, 5), (20, 2), (40, 5), (100, 12)])
def test_passes_are_as_many_as_the_plan_says(passes, classes):
    model, x = linear(classes), images()
    y = model(x).argmax(1)
    forward, backward = [], []
    model.register_forward_pre_hook(lambda _, inputs: forward.append(len(inputs[0])))
    model.register_full_backward_hook(lambda *_: backward.append(1))
    minimum_norm_attack(model, x, y, passes=passes)
    assert (len(forward), len(backward)) == plan_of(passes, min(classes - 1, 9)).passes()


class Masked(nn.Module):
    """Rounds its input: the gradient is 0, and the decision can be changed all the same."""

    def forward(self, x):
        first = (x.flatten(1)[:, :1] * 2).round()
        return torch.cat([first, 1.5 - first], 1) + 0 * x.flatten(1)[:, :2]


def test_a_vanishing_gradient_does_not_look_like_robustness():
    x, y = torch.full((6, 1, 2, 2), 0.8), torch.zeros(6, dtype=torch.int64)
    y[0] = 1
    assert (Masked()(torch.zeros_like(x)).argmax(1) == 1).all()
    found = minimum_norm_attack(Masked(), x, y)
    assert found.found.tolist() == [True, False, False, False, False, False]
    assert found.distance.tolist() == [0, *[math.inf] * 5]
    assert torch.equal(found.x, x)


def test_randomized_logits_are_not_counted_where_they_did_not_flip():
    class Noisy(nn.Module):
        def forward(self, x):
            noise = torch.randn(len(x), 2, generator=generator, dtype=x.dtype)
            return torch.stack([x.flatten(1).sum(1), torch.full((len(x),), 3.0, dtype=x.dtype)], 1) + 0.01 * noise

    generator = torch.Generator().manual_seed(0)
    x, y = torch.full((8, 1, 2, 2), 0.9).double(), torch.zeros(8, dtype=torch.int64)
    found = minimum_norm_attack(Noisy(), x, y)
    assert (found.distance[found.found] > 0.13).all()  # the boundary itself is at 0.15


def test_model_is_left_as_it_was():
    model, x = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4)).double(), images()
    y = model.eval()(x).argmax(1)
    model.train()
    before = copy.deepcopy(model.state_dict())
    minimum_norm_attack(model, x, y)
    assert model.training and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("passes", [20, 100])
def test_fixed_shapes_of_accelerators_give_the_same_points(passes, monkeypatch):
    model, x = linear(), images()
    y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    expected = minimum_norm_attack(model, x, y, passes=passes)
    sizes = set()
    model.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    monkeypatch.setattr(module, "has_fixed_shapes", lambda x: True)
    for field, other in zip(expected, minimum_norm_attack(model, x, y, passes=passes), strict=True):
        torch.testing.assert_close(field, other)
    assert sizes == {len(x)}


def test_what_is_found_is_pulled_back_to_the_boundary():
    """Steps end beyond a linear classifier's boundary by their overshoot; the bisection takes that back."""
    model, x = linear(), images()
    y = model(x).argmax(1)
    found = minimum_norm_attack(model, x, y, passes=10)
    boundary = closest_boundary(model, x, y, passes=10)
    assert (found.distance <= boundary.margin + 1e-12).all()
    beyond = -(model(found.x).gather(1, y[:, None])[:, 0] - model(found.x).scatter(1, y[:, None], -math.inf).amax(1))
    assert (beyond > HAIR * 0.999).all() and (beyond < 1e-2).all()


@pytest.mark.parametrize("fixed", [False, True])
def test_points_to_measure_cost_the_misclassified_a_forward_pass(fixed, monkeypatch):
    model, x = linear(), images()
    y = model(x).argmax(1)
    y[::2] = (y[::2] + 1) % 5
    forward, backward = [], []
    model.register_forward_pre_hook(lambda _, inputs: forward.append(len(inputs[0])))
    model.register_full_backward_hook(lambda _, __, outputs: backward.append(len(outputs[0])))
    monkeypatch.setattr(module, "has_fixed_shapes", lambda x: fixed)
    boundary = closest_boundary(model, x, y, passes=10)
    plan = plan_of(10, 4)
    if not fixed:
        assert forward == [24] + [12] * (plan.passes()[0] - plan.bisections) and backward == [12] * 10
    assert boundary.found.tolist() == [False, True] * 12
    assert (
        torch.equal(boundary.x[::2], x[::2]) and (boundary.margin[::2] == 0).all() and (boundary.value[::2] < 0).all()
    )
    logits = model(boundary.x)
    value = logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -math.inf).amax(1)
    torch.testing.assert_close(boundary.value, value)
    expected = class_distances(model, x, y, "Linf").amin(1)
    torch.testing.assert_close(boundary.margin[1::2], expected[1::2], rtol=0.05, atol=1e-4)


def test_an_empty_batch():
    found = minimum_norm_attack(linear(), images()[:0], torch.zeros(0, dtype=torch.int64))
    assert found.x.shape == (0, 1, 3, 4) and found.found.shape == found.distance.shape == (0,)
    boundary = closest_boundary(linear(), images()[:0], torch.zeros(0, dtype=torch.int64))
    assert boundary.x.shape == boundary.grad.shape == (0, 1, 3, 4) and boundary.margin.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"norm": "L3"}, "L3"), ({"passes": 1}, "passes must be at least 2, got 1")],
)
def test_bad_arguments_are_named(arguments, message):
    x = images()
    with pytest.raises(ValueError, match=message):
        minimum_norm_attack(linear(), x, linear()(x).argmax(1), **arguments)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        minimum_norm_attack(linear(), x + 1, linear()(x).argmax(1))
