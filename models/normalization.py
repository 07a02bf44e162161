"""Normalization of the input by a dataset's mean and standard deviation, and GroupNorm in the place of BatchNorm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)

MAX_GROUPS = 32


class Normalization(nn.Module):
    """(x - mean) / std per channel, for pixels x in [0, 1] of shape (n, 3, h, w).

    `mean` and `std` are buffers outside the state dict, as in RobustBench's `DMWideResNet`.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        mean, std = [float(value) for value in mean], [float(value) for value in std]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} {values!r}: expected three finite numbers, one per colour channel")
        if min(std) <= 0:
            raise ValueError(f"std {std!r}: expected three positive numbers")
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def input_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """The first layer of every model: `Normalization`, or nothing where `mean` is None."""
    return nn.Identity() if mean is None else Normalization(mean, std)


def replace_batch_norm(module: nn.Module) -> int:
    """Replace every BatchNorm2d(C) inside `module`, in place, by GroupNorm(min(32, C), C), as in Xu et al., 2023.

    The names stay. Where min(32, C) does not divide C (WRN-D-3 has 48 channels), the number of groups is the largest
    divisor of C up to 32. Returns how many there were. Raises ValueError for a layer that does more than a BatchNorm2d,
    timm's with an activation inside, say.
    """
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if type(child) is not nn.BatchNorm2d:
                kind = type(child).__name__
                raise ValueError(f"GroupNorm cannot take the place of {name}, a {kind}, which is more than BatchNorm2d")
            channels = child.num_features
            groups = next(g for g in range(min(MAX_GROUPS, channels), 0, -1) if channels % g == 0)
            setattr(module, name, nn.GroupNorm(groups, channels))
            replaced += 1
        else:
            replaced += replace_batch_norm(child)
    return replaced
