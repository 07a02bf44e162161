"""What the tests of files, checkpoints and folders share: states, mutated bytes.

With DYART_LARGE_TESTS=1: 200 kills instead of 20, and 1,500 mutated files of each kind instead of 60.
"""

import codecs
import contextlib
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from experiment.checkpoint import save_checkpoint
from experiment.folder import Experiment
from storage.files import FileError

LARGE = os.environ.get("DYART_LARGE_TESTS") == "1"


KILLS = 200 if LARGE else 20


mutations = settings(max_examples=1500 if LARGE else 60, deadline=None, database=None, derandomize=not LARGE)


SETTINGS = {"dataset": "digits", "epochs": 3, "lr": 1e-05, "eps": [2, 4], "pretrained": None, "augment": True}


def quiet(_: str) -> None:
    pass


def new_experiment(root: Path, name: str = "run") -> Experiment:
    return Experiment.create(root, name, SETTINGS, echo=quiet)


def a_state(epoch: int = 0) -> dict[str, Any]:
    """What training saves, in small: every type and several dtypes, with `epoch` written all over it."""
    return {
        "model": OrderedDict(weight=torch.full((3, 4), float(epoch)), running=torch.arange(5) + epoch),
        "half": torch.full((2,), epoch, dtype=torch.bfloat16),
        "scalar": torch.tensor(epoch, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
        "optimizer": {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"betas": (0.9, 0.95), "lr": 1e-3}]},
        "rng": torch.Generator().manual_seed(0).get_state(),
        "python_rng": random.Random(0).getstate(),
        "settings": {"name": "é\udc80", "flag": True, "nan": float("nan")},
        "raw": b"\0\xff",
        "epoch": epoch,
    }


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def loaded(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "format": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def refused(pattern: str, path: Path | None = None, error: type[Exception] = FileError) -> Iterator[None]:
    """The body raises `error` in one line that matches and names `path`, and leaves the file `path` as it was."""
    before = path.read_bytes() if path is not None and path.is_file() else None
    with pytest.raises(error, match=pattern) as caught:
        yield
    assert "\n" not in str(caught.value)
    if path is not None:
        assert str(path) in str(caught.value)
        assert before is None or path.read_bytes() == before


def mutate(data: st.DataObject, content: bytes, extra: list[bytes] = []) -> bytes:  # noqa: B006
    """`content` with one to four bytes changed, or stretches cut, doubled, or put in."""
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(mutated) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "put", "cut", "double", "truncate", *["extra"] * bool(extra)])):
            case "flip" if mutated:
                mutated[at] ^= data.draw(st.integers(1, 255))
            case "put":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del mutated[at : at + data.draw(st.integers(1, 40))]
            case "double":
                mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 40))]
            case "truncate":
                del mutated[at:]
            case "extra":
                mutated[at:at] = data.draw(st.sampled_from(extra))
    return bytes(mutated)


def loads_or_refuses(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, or None where it refuses in one line; any other exception, or a changed file, fails."""
    before = path.read_bytes()
    try:
        result = read()
    except FileError as error:
        result = None
        assert "\n" not in str(error)
        assert str(path) in str(error)
    assert path.read_bytes() == before
    return result


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's privilege to write where permissions forbid it."""
    is_root = os.geteuid() == 0
    codecs.lookup("latin1")  # imported when a checkpoint is first read, and others may not look into root's Python
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def a_folder_of_everything(root: Path) -> Path:
    """A folder with a good file of each kind: checkpoints, foreign ones, args.yaml, metrics.csv."""
    with new_experiment(root) as run:
        save_checkpoint(run.folder / "good.pt", a_state(3))
        torch.save(torch.nn.Linear(3, 2).state_dict(), run.folder / "bare.pt")
        torch.save({"w": torch.ones(3)}, run.folder / "legacy.pt", _use_new_zipfile_serialization=False)
        run.append_metrics({"epoch": 1, "loss": 0.5, "note": 'a, "b"'})
        run.append_metrics({"epoch": 2, "loss": float("nan"), "note": None})
        (run.folder / "good.yaml").write_bytes((run.folder / "args.yaml").read_bytes())
        (run.folder / "good.csv").write_bytes((run.folder / "metrics.csv").read_bytes())
        return run.folder
