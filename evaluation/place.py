"""Which checkpoints an evaluation reads and where its results go: an experiment folder, or a bare file. For eval.py."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment
from storage.files import FileError, naming
from storage.lock import Locked, take_lock


class Place(NamedTuple):
    """The checkpoints to evaluate, where their results are kept, and the log."""

    checkpoints: list[Path]
    results: Results
    log: Callable[[str], Any]


@contextlib.contextmanager
def open_place(target: Path, names: list[str] | None) -> Iterator[Place]:
    """The folder or file to evaluate, locked against a second evaluation; a folder's file stands for its folder.

    names: the folder's checkpoints, by default best.pt. Raises ValueError or OSError.
    """
    if target.is_file() and names is not None:
        raise ValueError(f"--checkpoint {names[0]}: {target} is a checkpoint itself, not an experiment folder")
    if target.is_file() and (target.parent / "args.yaml").exists():
        target, names = target.parent, [target.name]
    with _open_file(target) if target.is_file() else _open_folder(target, names or ["best.pt"]) as place:
        yield place


@contextlib.contextmanager
def _open_folder(folder: Path, names: list[str]) -> Iterator[Place]:
    with Experiment.open(folder, lock="eval", echo=tqdm.write) as experiment:
        names = [name if name.endswith(".pt") else f"{name}.pt" for name in names]
        there = sorted(path.name for path in folder.glob("*.pt"))
        for name in names:
            if name not in there:
                raise ValueError(f"--checkpoint {name}: {folder} has {', '.join(there) or 'no checkpoints'}")
        paths = [folder / name for name in dict.fromkeys(names)]
        yield Place(paths, Results(folder / "autoattack"), experiment.log)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[Place]:
    flags.check_writable(path.parent, "results are written beside")

    def log(message: str) -> None:
        tqdm.write(message)
        with open(f"{path}.eval.log", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    lock_path = path.with_name(f".{path.name}.lock-eval")
    with naming("lock", lock_path):
        try:
            lock = take_lock(lock_path)
        except Locked as holder:
            raise FileError(f"{path} is in use: {holder} evaluates it") from None
    try:
        yield Place([path], Results(path.with_name(f"{path.name}.autoattack")), log)
    finally:
        if lock is not None:
            lock.release()
