"""Update directions and boundary speed, against closed forms, finite differences and plain re-statements."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dyart.dynamics import (
    boundary_speed,
    negative_speed_share,
    refined_margin,
    unit_direction,
    update_direction,
)
from dyart.losses import LOSSES
from dyart.margin import Boundary, find_boundary

DUAL = {"Linf": 1, "L2": 2}


def linear(dim=6, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(dim, 2).double()


def small_network(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, classes)).double()


def small_convnet():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = nn.Sequential(*layers).double()
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(32, 3, 4, 4, dtype=torch.float64))
    return model.eval()


def correct_points(model, number, shape, low=0.0, high=1.0, seed=1):
    x = low + (high - low) * torch.rand(number, *shape, dtype=torch.float64, generator=torch.manual_seed(seed))
    with torch.no_grad():
        return x, model(x).argmax(1)


def random_direction(model, seed=2):
    generator = torch.manual_seed(seed)
    return unit_direction(
        {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in model.named_parameters()}
    )


def moved(model, direction, length):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += length * direction[name]
    return model


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("temperature", [math.inf, 5.0])
def test_speed_of_a_linear_boundary_is_the_derivative_of_its_distance(norm, temperature):
    """R = (w·x + b) / ‖w‖_q away from the box; its derivative along θ' by the quotient rule."""
    model = linear()
    x, y = correct_points(model, 40, (6,), 0.4, 0.6)
    with torch.no_grad():  # A boundary near the middle, so that the box is far.
        model.bias.sub_(model(torch.full((6,), 0.5, dtype=torch.float64)))
        y = model(x).argmax(1)
    direction = random_direction(model)
    boundary = find_boundary(model, x, y, norm=norm, temperature=temperature, steps=20)
    inside = boundary.found & (boundary.x.amin(1) > 0) & (boundary.x.amax(1) < 1)
    assert inside.sum() > 20

    q = DUAL[norm]
    sign = 1.0 - 2.0 * y
    w = (model.weight[0] - model.weight[1]).detach()
    dw = direction["weight"][0] - direction["weight"][1]
    b, db = (model.bias[0] - model.bias[1]).detach(), direction["bias"][0] - direction["bias"][1]
    length = torch.linalg.vector_norm(w, q)
    dlength = (w.sign() * dw).sum() if q == 1 else w @ dw / length
    value = sign * (x @ w + b)
    closed = sign * (x @ dw + db) / length - value * dlength / length**2

    for examples in (None, x):
        speed = boundary_speed(model, boundary, y, direction, norm=norm, temperature=temperature, x=examples)
        # The search ends 1e-3 or so beyond the boundary, and the speed is that of the point where it ends.
        torch.testing.assert_close(speed[inside], closed[inside], rtol=0.02, atol=2e-3 * closed.abs().max().item())


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("temperature", [math.inf, 5.0])
def test_speed_of_a_network_is_the_change_of_its_margins_up_to_the_step(norm, temperature):
    """(R(θ + h θ') − R(θ)) / h is the speed, with an error in proportion to h."""
    model = small_network()
    x, y = correct_points(model, 60, (8,), 0.2, 0.8)
    direction = random_direction(model)
    search = {"norm": norm, "temperature": temperature, "steps": 200}
    start = find_boundary(model, x, y, **search)
    speed = boundary_speed(model, start, y, direction, norm=norm, temperature=temperature, x=x)
    errors = []
    for length in (4e-2, 2e-2, 1e-2):
        end = find_boundary(moved(model, direction, length), x, y, **search)
        both = start.found & end.found
        change = (refined_margin(x, end, norm) - refined_margin(x, start, norm)) / length
        errors.append(((change - speed)[both].abs().median() / speed[both].abs().median()).item())
    assert both.sum() > 20
    assert errors[0] < 0.1
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_speed_with_x_is_exact_where_the_closest_point_lies_on_the_box(norm):
    """Half of the coordinates start within 0.04 of a face, so that the others have to make up for them."""
    model = linear(dim=8)
    x, _ = correct_points(model, 50, (8,), 0.3, 0.7)
    x[:, ::2] = 0.04
    with torch.no_grad():
        w = (model.weight[0] - model.weight[1]).clone()
        w[::2] = w[::2].abs()
        model.weight[0], model.weight[1] = w, 0
        model.bias[0], model.bias[1] = 0.3 - w @ x.mean(0), 0
    y = torch.zeros(50, dtype=torch.int64)
    direction, length = random_direction(model), 1e-5
    search = {"norm": norm, "temperature": math.inf, "steps": 50}
    start = find_boundary(model, x, y, **search)
    end = find_boundary(moved(model, direction, length), x, y, **search)
    both = start.found & end.found & (start.margin > 0.05)
    assert both.sum() > 20
    change = (refined_margin(x, end, norm) - refined_margin(x, start, norm)) / length
    exact = boundary_speed(model, start, y, direction, norm=norm, temperature=math.inf, x=x)
    paper = boundary_speed(model, start, y, direction, norm=norm, temperature=math.inf)
    relative = ((change - exact).abs() / exact.abs())[both]
    assert relative.median() < 2e-3
    # Without the box the speed keeps its sign and loses size.
    assert (paper.sign() == exact.sign())[both].all()
    assert (paper.abs() < 0.9 * exact.abs())[both].float().mean() > 0.5


def test_speed_of_each_point_is_that_of_a_backward_pass_for_it_alone():
    model = small_convnet()
    x, y = correct_points(model, 10, (3, 4, 4))
    boundary = find_boundary(model, x, y, steps=20)
    direction = random_direction(model)
    speed = boundary_speed(model, boundary, y, direction)
    model.requires_grad_(True)
    for i in boundary.found.nonzero()[:, 0]:
        logits = model(boundary.x[i : i + 1])[0]
        others = torch.cat([logits[: y[i]], logits[y[i] + 1 :]])
        value = logits[y[i]] - (5 * others).logsumexp(0) / 5
        grads = torch.autograd.grad(value, list(model.parameters()))
        product = sum((g * direction[name]).sum() for g, (name, _) in zip(grads, model.named_parameters(), strict=True))
        torch.testing.assert_close(speed[i], product / boundary.grad[i].abs().sum(), rtol=1e-9, atol=1e-12)


def test_speed_is_nan_where_no_boundary_point_was_found():
    model = small_network()
    x, y = correct_points(model, 6, (8,))
    y[:3] = (y[:3] + 1) % 3
    boundary = find_boundary(model, x, y, steps=20)
    speed = boundary_speed(model, boundary, y, random_direction(model))
    assert not boundary.found[:3].any()
    assert (speed.isnan() == ~boundary.found).all()


def test_speed_refuses_a_direction_of_another_model():
    model = small_network()
    x, y = correct_points(model, 4, (8,))
    boundary = find_boundary(model, x, y, steps=3)
    with pytest.raises(ValueError, match="differ in extra"):
        boundary_speed(model, boundary, y, random_direction(model) | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown norm 'L7'"):
        boundary_speed(model, boundary, y, random_direction(model), norm="L7", x=x)


OPTIONS = {
    "clean": {},
    "dyart": {"steps": 5, "lambda_robust": 20.0, "high_quality": False},
    "at": {"steps": 3},
    "trades": {"steps": 3},
    "mart": {"steps": 3},
    "n-fgsm": {},
    "fgsm-rs": {},
}


@pytest.mark.parametrize("method", LOSSES)
def test_direction_is_minus_the_gradient_of_the_loss_in_train_mode(method):
    model = small_convnet()
    x, y = correct_points(model, 12, (3, 4, 4))
    direction = update_direction(method, model, [(x, y)], **OPTIONS[method])
    again = copy.deepcopy(model)
    options = OPTIONS[method] | ({} if method == "clean" else {"generator": torch.Generator().manual_seed(0)})
    LOSSES[method](again, x, y, **options)[0].backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(direction[name], -parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", LOSSES)
def test_direction_leaves_model_optimizer_and_random_state_alone(method):
    model = small_convnet()
    x, y = correct_points(model, 12, (3, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    random_state = torch.get_rng_state()
    direction = update_direction(method, model, [(x, y)], optimizer=optimizer, clip_grad=1.0, **OPTIONS[method])
    torch.get_rng_state()
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert direction.keys() == dict(model.named_parameters()).keys()


def test_direction_of_the_optimizer_is_the_step_that_it_takes_next():
    """With momentum, Nesterov, weight decay and a gradient that clipping shortens."""
    model = small_convnet()
    x, y = correct_points(model, 12, (3, 4, 4))
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    optimizer = torch.optim.SGD(model.parameters(), **sgd)

    def step():
        optimizer.zero_grad()
        model.train()
        F.cross_entropy(model(x), y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.step()

    step()
    direction = update_direction("clean", model, [(x, y)], optimizer=optimizer, clip_grad=0.05)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(direction[name], parameter.detach() - before[name], rtol=1e-9, atol=1e-12)


def test_direction_over_several_batches_is_the_mean_over_examples():
    model = small_network()  # Without BatchNorm the parts do not depend on each other.
    x, y = correct_points(model, 12, (8,))
    whole = update_direction("clean", model, [(x, y)])
    parts = update_direction("clean", model, iter([(x[:9], y[:9]), (x[9:], y[9:])]))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)


def test_direction_is_zero_for_parameters_that_are_not_trained():
    model = small_network()
    model[0].requires_grad_(False)
    x, y = correct_points(model, 4, (8,))
    direction = update_direction("clean", model, [(x, y)])
    assert direction["0.weight"].abs().max() == 0
    assert direction["2.weight"].abs().max() > 0


def test_direction_refuses_what_it_cannot_do():
    model = small_network()
    with pytest.raises(ValueError, match="unknown method 'fgsm': choose from clean, dyart, at, trades, mart"):
        update_direction("fgsm", model, [])
    with pytest.raises(ValueError, match="no examples"):
        update_direction("clean", model, [])


def test_unit_direction_has_length_one_over_all_parameters():
    direction = unit_direction({"a": torch.full((2, 2), 3.0), "b": torch.full((4,), 4.0)})
    assert torch.cat([value.flatten() for value in direction.values()]).norm().item() == pytest.approx(1)
    assert direction["b"][0] / direction["a"][0, 0] == pytest.approx(4 / 3)
    assert unit_direction({"a": torch.zeros(3)})["a"].tolist() == [0, 0, 0]


def test_share_counts_the_negative_among_the_vulnerable():
    model = small_network()
    x, y = correct_points(model, 40, (8,))
    share = {b: negative_speed_share(model, x, y, "clean", below=b) for b in (0.05, 0.1, 1.0, 1e-9)}
    boundary = find_boundary(model, x, y, temperature=math.inf, steps=10)
    speed = boundary_speed(model, boundary, y, update_direction("clean", model, [(x, y)]), temperature=math.inf)
    for below in (0.05, 0.1, 1.0):
        rows = [i for i in range(40) if boundary.found[i] and boundary.margin[i] < below]
        assert share[below] == pytest.approx(sum(speed[i].item() < 0 for i in rows) / len(rows))
    assert 0 < share[1.0] < 1
    assert math.isnan(share[1e-9])


def test_refined_margin_of_a_linear_boundary_is_exact():
    """A point beyond the boundary, by more than the search leaves: w = (2, 1), x at distance 0.1."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0], [0.0, 0.0]]))
        model.bias.copy_(torch.tensor([-1.2, 0.0]))
    x = torch.full((1, 2), 0.5, dtype=torch.float64)  # Φ = 0.3, so that R = 0.3 / 3.
    beyond = x - 0.15
    value, grad = model(beyond)[:, 0].detach(), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    boundary = Boundary(beyond, torch.tensor([True]), torch.tensor([0.15]).double(), value, grad)
    assert refined_margin(x, boundary).item() == pytest.approx(0.1)
