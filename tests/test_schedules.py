"""The schedules, epoch by epoch: against their formulas written out, and PyTorch's one-cycle at the paper's lengths."""

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from experiment.schedules import SCHEDULES, idle_epochs


def values(name: str, epochs: int, steps: int = 1, lr: float = 0.1) -> list[tuple[float, float]]:
    """(learning rate, momentum) of each of `epochs`, or of each step where the schedule goes by steps."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9, nesterov=True)
    schedule = SCHEDULES[name]
    scheduler = schedule.make(optimizer, lr, epochs, steps)
    rows = []
    for _ in range(epochs * steps if schedule.every_step else epochs):
        rows.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        scheduler.step()
    return rows


def between(first: float, last: float, share: float) -> float:
    """Cosine annealing from `first` to `last`, at `share` of the way."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("epochs", [100, 200, 800])
def test_cosinew_is_one_cycle_over_epochs_at_the_papers_lengths(epochs):
    warmup, last = 0.025 * epochs - 1, epochs - 1
    for epoch, (lr, momentum) in enumerate(values("cosinew", epochs)):
        if epoch <= warmup:
            expected = between(0.1 / 25, 0.1, epoch / warmup), between(0.95, 0.85, epoch / warmup)
        else:
            share = (epoch - warmup) / (last - warmup)
            expected = between(0.1, 0.1 / 25e4, share), between(0.85, 0.95, share)
        assert (lr, momentum) == pytest.approx(expected, rel=1e-6)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=epochs, pct_start=0.025)
    for lr, momentum in values("cosinew", epochs):
        assert (lr, momentum) == (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()


def test_cosinew_trains_for_one_epoch_at_the_peak_and_runs_at_every_length():
    assert values("cosinew", 1) == [(0.1, 0.9)]
    for epochs in range(2, 90):  # PyTorch's formula divides by zero at 40
        rates = [lr for lr, _ in values("cosinew", epochs)]
        assert max(rates) > 0.05 and rates[-1] < 1e-6 and all(0 < rate <= 0.1 for rate in rates)
    rates = [lr for lr, _ in values("cosinew", 40)]
    assert rates[0] == pytest.approx(0.004) and rates[1:] == sorted(rates[1:], reverse=True) and rates[1] > 0.0998


def test_cyclic_warms_up_over_a_quarter_of_all_steps():
    rates = [lr for lr, _ in values("cyclic", 4, steps=10)]
    assert rates.index(max(rates)) == 9 and max(rates) == pytest.approx(0.1)
    assert rates[0] == pytest.approx(0.004) and rates[-1] < 1e-6
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    for steps in range(1, 9):  # 4 steps, of which 1 is warm-up, divide by zero in PyTorch
        rates = [lr for lr, _ in values("cyclic", 1, steps=steps)]
        assert max(rates) > 0.03


@pytest.mark.parametrize(("epochs", "half", "three_quarters"), [(100, 50, 75), (22, 11, 17), (5, 3, 4), (1, 1, 1)])
def test_step_takes_a_tenth_at_half_and_three_quarters(epochs, half, three_quarters):
    expected = [0.1] * half + [0.01] * (three_quarters - half) + [0.001] * (epochs - three_quarters)
    assert values("step", epochs) == [(pytest.approx(lr), 0.9) for lr in expected]


def test_cosine_goes_from_lr_to_0():
    assert values("cosine", 8) == [(pytest.approx(between(0.1, 0, epoch / 8)), 0.9) for epoch in range(8)]
    assert values("cosine", 1) == [(0.1, 0.9)]


def test_constant_is_constant_and_alone_can_be_extended():
    assert values("constant", 7) == [(0.1, 0.9)] * 7
    assert [name for name, schedule in SCHEDULES.items() if schedule.extendable] == ["constant"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_says_whether_it_changes_momentum(name):
    momenta = {momentum for _, momentum in values(name, 10, steps=4)}
    assert SCHEDULES[name].cycles_momentum == (momenta != {0.9})


@pytest.mark.parametrize(
    ("name", "epochs", "idle"),
    [("cosinew", 1, 0), ("cosinew", 2, 1), ("cosinew", 3, 1), ("cosinew", 200, 0), ("cyclic", 2, 0), ("step", 2, 0)],
)
def test_epochs_without_a_rate_are_counted(name, epochs, idle):
    assert idle_epochs(name, epochs) == idle
