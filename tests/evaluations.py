"""What the tests of evaluations share: short attacks, a model that they leave something of, checkpoints to evaluate."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from data import DATASETS, Split, load_data, to_input
from evaluation import attack
from evaluation.results import Results
from experiment.folder import Experiment
from models import create_model

CPU = torch.device("cpu")
SETTINGS = {"dataset": "digits", "model": "wrn-10-1-swish", "group_norm": False, "normalize": False}


class ShortAutoAttack(AutoAttack):
    """AutoAttack with so few steps that each of its attacks leaves something to the next."""

    queries = 30

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 2
        self.fab.n_iter = 2
        self.square.n_queries = self.queries


def raise_interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


class Rough(nn.Module):
    """Ripples, on which short attacks get stuck at different places."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(50 * x) / 50


class Stairs(nn.Module):
    """Steps with no gradient: only Square, which asks for none, finds its way."""

    def forward(self, x: Tensor) -> Tensor:
        return (6 * x).round() / 6


@functools.cache
def digits() -> Split:
    """The test images, for all tests of a process."""
    return load_data("digits")[1]


@functools.cache
def cifar10_test() -> Split:
    """CIFAR-10's test images, fetched into data/ where they are not; the test is skipped where nobody answers."""
    try:
        return load_data("cifar10")[1]
    except OSError as error:
        pytest.skip(f"no CIFAR-10: {error}")


@functools.cache
def learn_digits(first: type[nn.Module]) -> nn.Module:
    """A small model of the test images behind a layer of the kind `first`; it stays as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = to_input(digits().images), digits().labels
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def identity(**changes: Any) -> dict[str, Any]:
    """What is evaluated, and how. text: ε, for Linf in 1/255."""
    text, norm = changes.pop("text", "20"), changes.get("norm", "Linf")
    radius = {"eps": float(text), "eps_text": text}
    if norm == "Linf":
        radius = {"eps": float(text) / 255, "eps_text": f"{text}/255"}
    values = {"dataset": "digits", "model": "toy", "group_norm": False, "normalize": False, "checkpoint": "best.pt"}
    values |= {"sha256": "0" * 64, "weights": "average", "norm": norm, **radius}
    return values | {"version": "standard", "n": 30, "seed": 3, "batch_size": 8} | changes


def evaluate(model: nn.Module, test: Split, folder: Path, **changes: Any) -> dict[str, Any]:
    """A record of the attacks, kept in `folder`."""
    results = Results(folder / "autoattack")
    return attack.evaluate(model, test, identity(**changes), results, CPU, lambda message: None)


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when and how often an evaluation was interrupted."""
    return {name: value for name, value in record.items() if name not in ("seconds", "date")}


def new_model(seed: int) -> nn.Module:
    """An untrained model of SETTINGS."""
    torch.manual_seed(seed)
    info = DATASETS["digits"]
    return create_model("wrn-10-1-swish", mean=info.mean, std=info.std).eval()


def two_checkpoints(root: Path) -> Path:
    """An experiment folder with two checkpoints, whose raw weights are not their averaged ones."""
    with Experiment.create(root, "run", SETTINGS, echo=lambda message: None) as experiment:
        for seed, name in enumerate(["burn_in", "best"]):
            weights = {"average": new_model(seed).state_dict(), "model": new_model(seed + 10).state_dict()}
            experiment.save_named(name, {"settings": SETTINGS, "epoch": 1, **weights})
    return experiment.folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if ".lock" not in path.name}
