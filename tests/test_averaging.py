"""The weight average against its recurrence, written out."""

import copy

import pytest
import torch
from torch import nn

from dyart.averaging import WeightAverage, average_decay, statistics_momentum


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


@pytest.mark.parametrize(
    ("step", "warmup", "expected"),
    [
        (1, 0, 2 / 11),
        (2, 0, 3 / 12),
        (1, 5, 0.0),
        (5, 5, 0.0),
        (6, 5, 2 / 11),
        (1781, 0, 1782 / 1791),
        (1791, 0, 0.995),  # (1 + t) / (10 + t) reaches τ at t = 1790
        (10**6, 0, 0.995),
    ],
)
def test_decay(step, warmup, expected):
    assert average_decay(step, warmup, 0.995) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 2])
def test_recurrence(warmup):
    model = network()
    average = WeightAverage(model, tau=0.4, warmup_steps=warmup)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    decays = {0: [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4, 0.4], 2: [0, 0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]}
    for step, decay in enumerate(decays[warmup], 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(8, 3, dtype=torch.float64))
        average.update(model, step)
        for name, value in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
        for name, value in average.model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name])
        for mine, theirs in zip(average.model.buffers(), model.buffers(), strict=True):
            assert torch.equal(mine, theirs)
    assert average.model[1].num_batches_tracked == 7


def test_average_is_an_eval_copy_apart_from_the_model():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model)
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model[0].weight += 1
    average.update(model, 1)
    with torch.no_grad():
        average.model[2].weight.zero_()
        average.model[1].running_mean.fill_(7)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("tau", [-0.1, 1.0, float("nan")])
def test_tau_out_of_range_is_named(tau):
    with pytest.raises(ValueError, match=rf"tau must lie in \[0, 1\), got {tau}"):
        WeightAverage(network(), tau=tau)


@pytest.mark.parametrize(
    ("usual", "steps", "expected"),
    [(0.01, 10_000, 0.01), (0.01, 1000, 0.01), (0.01, 200, 0.05), (0.1, 200, 0.1), (0.1, 40, 0.25), (0.01, 3, 0.5)],
)
def test_statistics_look_back_a_tenth_of_a_short_training(usual, steps, expected):
    assert statistics_momentum(usual, steps) == pytest.approx(expected)
