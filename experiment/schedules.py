"""Learning-rate schedules by name, all of them PyTorch's own; the one-cycle ones also cycle momentum (0.95 to 0.85)."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR


class Schedule(NamedTuple):
    """How a schedule is made from (optimizer, peak lr, epochs, steps an epoch), and when it is stepped.

    every_step: after every optimizer step, and not after every epoch.
    cycles_momentum: the optimizer's own momentum has no effect.
    extendable: the first epochs do not depend on how many follow, so that a finished run can be made longer. So in
        its short runs BatchNorm's statistics look back a tenth of the steps so far, not of all (`statistics_momentum`).
    """

    make: Callable[[Optimizer, float, int, int], LRScheduler]
    every_step: bool = False
    cycles_momentum: bool = False
    extendable: bool = False


def _constant(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def _one_cycle(optimizer: Optimizer, lr: float, total: int, warmup: float) -> LRScheduler:
    # PyTorch's formula has only its end, a rate of nearly 0, for a single step, and divides by 0 where exactly one
    # step is warm-up.
    if total == 1:
        return _constant(optimizer, lr, total, total)
    return OneCycleLR(optimizer, lr, total_steps=total, pct_start=1.01 * warmup if warmup * total == 1 else warmup)


def _one_cycle_by_epoch(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return _one_cycle(optimizer, lr, epochs, 0.025)


def _one_cycle_by_step(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return _one_cycle(optimizer, lr, epochs * steps, 0.25)


def _step(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return MultiStepLR(optimizer, [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)])


def _cosine(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, epochs)


SCHEDULES = {
    # Over epochs, 2.5 % warm-up and cosine to near zero: the paper's.
    "cosinew": Schedule(_one_cycle_by_epoch, cycles_momentum=True),
    # A tenth of the rate from half and again from three quarters of the epochs on.
    "step": Schedule(_step),
    # From lr to 0, per epoch.
    "cosine": Schedule(_cosine),
    # Over steps, 25 % warm-up.
    "cyclic": Schedule(_one_cycle_by_step, every_step=True, cycles_momentum=True),
    "constant": Schedule(_constant, extendable=True),
}


def idle_epochs(name: str, epochs: int) -> int:
    """How many epochs of a short run a schedule by epoch leaves with less than a hundredth of the peak rate.

    0 where these are no more than a quarter, as at the end of any long run.
    """
    if SCHEDULES[name].every_step:
        return 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = SCHEDULES[name].make(optimizer, 1.0, epochs, 1), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    idle = sum(rate < 0.01 for rate in rates)
    return idle if idle > epochs / 4 else 0
