"""What the tests of training share: tiny runs on digits, and the comparison of experiment folders."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from evaluation.results import IDENTITY, Results
from experiment import flags
from experiment.checkpoint import load_checkpoint
from experiment.folder import Experiment
from experiment.settings import resolve
from experiment.train_flags import parse

# Three steps an epoch, the last with fewer images; an untrained model is right on some images by chance, and at this
# temperature that is enough for boundary points.
TINY = "--dataset digits --model wrn-10-1-swish --device cpu --train-subset 40 --validation-size 12 --temperature 100"
TINY += " --batch-size 16 --burn-in-batch-size 16 --validation-batch-size 8 --validation-attack-iter 2"
TINY += " --burn-in-epochs 0 --epochs 2"


def tiny(root: Path, *extra: str) -> list[str]:
    """The flags of a tiny run in `root`/run; extra ones take precedence."""
    return [*TINY.split(), "--output-dir", str(root), "--name", "run", *extra]


def write_generated(path: Path) -> None:
    """Generated data of 30 images of noise, for runs on digits."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    np.savez(path, image=images, label=rng.integers(10, size=30))


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers of signals back that training replaces."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_training(*argv: str) -> int:
    """train.py's main; its exit status."""
    with handlers_kept():
        return train.main(list(argv))


def finished_run(
    folder: Path,
    argv: list[str],
    clean: float,
    robust: dict[str, float],
    metrics: dict[str, float] | None = None,
    **record: Any,
) -> None:
    """Make the experiment folder that train.py with these flags and eval.py leave behind, or add records to it.

    robust: the accuracy by radius. metrics: what else stands in its metrics.csv; record: in each record of eval.py.
    """
    if not folder.exists():
        settings = resolve(parse(argv))
        with Experiment.create(folder.parent, folder.name, settings, echo=print) as experiment:
            row = {
                "epoch": 1,
                "stage": settings["method"],
                "found": 0.5,
                "passes": 6.6,
                "val_clean": 0.25,
                "val_robust": 0.125,
            }
            experiment.append_metrics(row | {"seconds": 2.0} | (metrics or {}))
    results = Results(folder / "autoattack")
    for eps, accuracy in robust.items():
        identity = dict.fromkeys(IDENTITY, 0) | {"eps": float(eps.split("/")[0]) / 255, "eps_text": eps}
        found = {"test_size": 10000, "clean_accuracy": clean, "robust_accuracy": accuracy, "date": ""}
        results.finish(identity | found | {"version": "custom", "n": 256, "model": "wrn-10-1-swish", **record})


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, main: Callable[[list[str]], int] = train.main) -> str:
    """What a command line is refused with: one line on standard error, and exit status 2."""
    capsys.readouterr()
    with handlers_kept(), pytest.raises(SystemExit) as stop:
        flags.run(lambda: main(list(argv)))
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1 and "error: " in error, error
    return error


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the locks, which name the last process."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def contents(folder: Path) -> dict[str, Any]:
    """All that two runs must agree on: checkpoints, args.yaml, and metrics.csv but for time and memory."""
    found: dict[str, Any] = {
        path.name: load_checkpoint(path) for path in sorted(folder.glob("*.pt")) if path.name != "previous.pt"
    }
    experiment = Experiment.open(folder)
    rows = experiment.read_metrics()
    found["metrics.csv"] = [
        {name: value for name, value in row.items() if name not in ("seconds", "peak_memory_mib")} for row in rows
    ]
    return found | {"args.yaml": experiment.settings}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """The places where two nested values differ; tensors are compared bit for bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: {list(a)} and {list(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{where}: {a} and {b}"[:200]]
