"""Learning-rate schedules by name, all of them PyTorch's own."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR


class Schedule(NamedTuple):
    """How a schedule is made from (optimizer, peak lr, epochs, steps an epoch), and when it is stepped.

    `extendable`: the first epochs do not depend on how many follow, so that a finished run can be made longer.
    """

    make: Callable[[Optimizer, float, int, int], LRScheduler]
    every_step: bool = False
    extendable: bool = False


def _constant(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def _one_cycle_by_epoch(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, lr, total_steps=epochs, pct_start=0.025)


def _one_cycle_by_step(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.25)


def _step(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return MultiStepLR(optimizer, [math.ceil(epochs / 2), math.ceil(epochs * 3 / 4)])


def _cosine(optimizer: Optimizer, lr: float, epochs: int, steps: int) -> LRScheduler:
    return CosineAnnealingLR(optimizer, epochs)


SCHEDULES = {
    "cosinew": Schedule(_one_cycle_by_epoch),
    "step": Schedule(_step),
    "cosine": Schedule(_cosine),
    "cyclic": Schedule(_one_cycle_by_step, every_step=True),
    "constant": Schedule(_constant, extendable=True),
}
