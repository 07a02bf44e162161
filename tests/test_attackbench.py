"""The two functions for AttackBench, against a stand-in of its interface."""

import math
import sys

import pytest
import torch
from torch import nn

from dyart.attackbench import dyart_minimum_norm, get_dyart_minimum_norm
from dyart.minimum_norm import plan_of


class CountingModel(nn.Module):
    """As AttackBench's model wrapper: calls of a module inside are counted by hooks, and the best example is kept."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0
        model.register_full_backward_hook(self.count_backward)

    def count_backward(self, *_):
        self.backwards += 1

    def start(self, inputs, labels):
        self.inputs, self.labels, self.least = inputs, labels, torch.full((len(inputs),), math.inf).double()

    def forward(self, inputs):
        logits = self.model(inputs)
        self.forwards += 1
        if len(inputs) == len(self.inputs):
            distance = (inputs.detach() - self.inputs).flatten(1).abs().amax(1)
            flipped = logits.argmax(1) != self.labels
            self.least = torch.where(flipped, torch.minimum(self.least, distance), self.least)
        return logits


@pytest.fixture
def setting():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    x = torch.rand(10, 3, 2, 2).double() * 0.6 + 0.2
    model = CountingModel(inner)
    model.start(x, inner(x).argmax(1))
    return model, inner, x, model.labels


def options(config):
    """What Sacred reads: the local names of the configuration when it ends."""
    found = {}

    def keep(frame, event, _):
        if frame.f_code is config.__code__ and event == "return":
            found.update(frame.f_locals)

    sys.setprofile(keep)
    try:
        config()
    finally:
        sys.setprofile(None)
    return found


def test_configuration_names_its_getter_and_its_options():
    given = options(dyart_minimum_norm)
    assert get_dyart_minimum_norm.__name__ == f"get_{given.pop('source')}_{given.pop('name')}"
    assert given.pop("threat_model") == "linf"
    get_dyart_minimum_norm(**given)


def test_untargeted_attack_in_its_budget(setting):
    model, inner, x, y = setting
    attack = get_dyart_minimum_norm(norm=float("inf"), passes=20)
    adversarial = attack(model=model, inputs=x, labels=y, targeted=False, targets=None)
    assert ((adversarial >= 0) & (adversarial <= 1)).all() and (inner(adversarial).argmax(1) != y).all()
    assert (model.forwards, model.backwards) == plan_of(20, 4).passes()
    # What AttackBench has seen on the way is no better than what the attack hands back.
    distance = (adversarial - x).flatten(1).abs().amax(1)
    assert (distance <= model.least + 1e-12).all()


def test_targeted_attack(setting):
    model, inner, x, y = setting
    targets = inner(x).topk(2).indices[:, 1]
    attack = get_dyart_minimum_norm(norm=2.0, passes=40)
    adversarial = attack(model=model, inputs=x, labels=y, targeted=True, targets=targets)
    assert (inner(adversarial).argmax(1) == targets).float().mean() > 0.8


def test_another_norm_is_named():
    with pytest.raises(ValueError, match="inf or 2, got 1"):
        get_dyart_minimum_norm(norm=1, passes=20)
