"""The attack in AttackBench: against a stand-in of attackbenchlib 2.0.2, and in it where it is installed."""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from analysis.attacks import optimality
from dyart import attackbench as configs
from dyart.attackbench import get_dyart_minimum_norm
from dyart.minimum_norm import plan_of

ORDERS = {"linf": math.inf, "l2": 2}


class CountingModel(nn.Module):
    """As AttackBench's model: counts what goes through the network inside by hooks, and keeps the least distances."""

    def __init__(self, model, norm):
        super().__init__()
        self.model, self.norm, self.forwards, self.backwards = model, norm, 0, 0
        model.register_full_backward_hook(self.count_backward)

    def count_backward(self, _, gradient, __):
        self.backwards += len(gradient[0])

    def start(self, inputs, labels):
        self.inputs, self.labels, self.least = inputs, labels, torch.full((len(inputs),), math.inf).double()

    def forward(self, inputs):
        logits = self.model(inputs.clamp(0, 1))
        self.forwards += len(inputs)
        distances = torch.linalg.vector_norm((inputs.detach()[:, None] - self.inputs).flatten(2), ORDERS[self.norm], 2)
        distance, image = distances.min(1)
        flipped = logits.argmax(1) != self.labels[image]
        self.least.scatter_reduce_(0, image[flipped], distance[flipped], "amin")
        return logits


def call(attack, model, inputs, labels, norm, targets=None):
    """As AttackBench calls an attack: with what its signature names, and what comes back is changed in place."""
    given = {"targeted": targets is not None, "targets": targets, "threat_model": norm, "norm": norm}
    takes = inspect.signature(attack).parameters
    adversarial = attack(
        model=model, inputs=inputs, labels=labels, **{key: value for key, value in given.items() if key in takes}
    )
    return adversarial.detach_().clamp_(0, 1)


def setting(norm, dtype=torch.float64):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).to(dtype)
    x = torch.rand(10, 3, 2, 2, dtype=dtype) * 0.6 + 0.2
    model = CountingModel(inner, norm)
    model.start(x, inner(x).argmax(1))
    return model, inner, x, model.labels


def from_registry(name, threat_model, **changed):
    """As AttackBench's registry makes an attack of a module of configurations: found by the names of its functions."""
    functions = {
        key: function
        for key, function in inspect.getmembers(configs, inspect.isfunction)
        if function.__module__ == configs.__name__
    }
    named = [functions.get(f"{configs._prefix}_{name}{ending}", dict)() for ending in (f"_{threat_model}", "")]
    config = next(config for config in named if config.get("threat_model") == threat_model) | changed
    getter = functions[f"get_{configs._prefix}_{name}"]
    attack = getter(**{key: config[key] for key in inspect.signature(getter).parameters})
    return partial(configs._wrapper, attack=attack)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("registered", [False, True])
def test_untargeted_attack_in_its_budget(norm, registered):
    model, inner, x, y = setting(norm)
    before = x.clone()
    make = partial(from_registry, "minimum_norm") if registered else get_dyart_minimum_norm
    adversarial = call(make(norm, passes=20), model, x, y, norm)
    assert torch.equal(x, before) and (inner(adversarial).argmax(1) != y).all()
    forward, backward = plan_of(20, 4).passes()
    assert (model.forwards, model.backwards) == (10 * forward, 10 * backward)
    # What AttackBench has seen on the way is no better than what the attack hands back.
    distance = torch.linalg.vector_norm((adversarial - x).flatten(1), ORDERS[norm], 1)
    assert (distance <= model.least + 1e-12).all()


def test_targeted_attack():
    model, inner, x, y = setting("l2")
    targets = inner(x).topk(2).indices[:, 1]
    adversarial = call(get_dyart_minimum_norm("l2", 40), model, x, y, "l2", targets)
    assert (inner(adversarial).argmax(1) == targets).float().mean() > 0.8


def test_a_thousand_passes_are_in_its_budget():
    assert sum(plan_of(1000).passes()) < 2000


def test_another_norm_is_named():
    with pytest.raises(ValueError, match="linf or l2, got l1"):
        get_dyart_minimum_norm("l1", 20)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_within_attackbench(norm):
    benchmark = pytest.importorskip("attackbench", reason="pip install attackbenchlib==2.0.2")
    _, inner, x, y = setting(norm, torch.float32)
    y[0] = (y[0] + 1) % 5
    images = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    found = benchmark.run_attack(inner, images, get_dyart_minimum_norm(norm, 20), norm, debug=True)
    assert all(found["adv_success"]) and found["ori_success"] == [True, *[False] * 9] and not any(found["box_failures"])
    assert found["distances"][norm][0] == 0 and min(found["distances"][norm][1:]) > 0
    assert found["distances"][norm] == pytest.approx(found["final_distances"][norm], rel=1e-4)
    forward, backward = plan_of(20, 4).passes()
    # A query is counted for the nearest of the images, which of so small ones is now and then another.
    assert sum(found["num_forwards"]) == 9 * forward + 1 and sum(found["num_backwards"]) == 9 * backward + 4


def test_optimality_is_the_one_of_attackbench():
    """Which counts misclassified images in, at distance 0."""
    benchmark = pytest.importorskip("attackbench", reason="pip install attackbenchlib==2.0.2")
    best = np.random.default_rng(0).uniform(0.01, 0.1, 20)
    distance = best * np.random.default_rng(1).uniform(1, 2, 20)
    distance[3] = math.inf
    of_all = [np.r_[np.zeros(12), values] for values in (distance, best)]
    assert optimality(distance, best) == pytest.approx(benchmark.eval_optimality(*of_all, clean_acc=20 / 32))
