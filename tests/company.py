"""What the tests of several processes share: a tiny model, and runs in companies of forked processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from children import exit_status, fork_company
from runs import tiny
from torch import nn

import train
from experiment import flags
from experiment.checkpoint import load_checkpoint


class SmallNet(nn.Module):
    """Two convolutions: images (n, 3, 32, 32) to ten logits, in a few microseconds an image."""

    def __init__(self, num_classes: int = 10, *, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 16, 3, 2))
        self.norm, self.linear = nn.BatchNorm2d(16), nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.silu(self.norm(self.layers(x))).mean((2, 3)))


# 33 images in batches of 16: the last batch is one image, so that all but one of the processes have none of it.
SMALL = ["--model", "small", "--train-subset", "33", "--channels-last", "false"]


def small(root: Path, *extra: str) -> list[str]:
    """The flags of a run of SmallNet, which is to be in MODELS under the name of small, in `root`/run."""
    return tiny(root, *SMALL, *extra)


def train_script(argv: list[str]) -> int:
    """train.py as a script, in this process: its exit status."""
    try:
        flags.run(lambda: train.main(argv))
    except SystemExit as stop:
        return stop.code


def train_together(size: int, argv: list[str], outputs: Path, before: Callable[[int], Any] | None = None) -> list[int]:
    """Train in so many processes (one: a plain one) to the end; their exit statuses by rank.

    before: called in each process with its rank, before it starts. What they print goes to `outputs`/rank-0.txt, ...
    """

    def body(rank: int) -> int:
        if before is not None:
            before(rank)
        return train_script(argv)

    return [exit_status(pid) for pid in fork_company(size, body, outputs)]


def said(outputs: Path) -> list[str]:
    """What each process has printed, by rank, less progress bars."""
    texts = [path.read_text() for path in sorted(outputs.glob("rank-*.txt"))]
    return ["\n".join(line for line in text.replace("\r", "\n").split("\n") if "it/s" not in line) for text in texts]


def largest_difference(a: Path, b: Path) -> float:
    """Between the weights and averages that two runs ended with, as a share of the largest weight of each tensor."""
    ours, theirs = (load_checkpoint(folder / "latest.pt") for folder in (a, b))
    return max(
        ((ours[part][name] - value).abs().max() / value.abs().max().clamp_min(1e-3)).item()
        for part in ("model", "average")
        for name, value in theirs[part].items()
    )
