"""Which checkpoints an evaluation reads and where its results go: an experiment folder, or a bare file. For eval.py."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from evaluation.results import Results
from experiment import flags
from experiment.folder import Experiment, is_checkpoint_of_its_folder, named_checkpoints
from storage.files import FileError, check_log, naming, write_log
from storage.lock import Locked, take_lock


class Place(NamedTuple):
    """The checkpoints to evaluate, where their results are kept, and the log.

    origin: what the records say of where the checkpoints lie, if that is elsewhere: two targets may have one name.
    """

    checkpoints: list[Path]
    results: Results
    log: Callable[[str], Any]
    origin: dict[str, str]


@contextlib.contextmanager
def open_place(target: Path, names: list[str] | None, output_dir: Path | None = None) -> Iterator[Place]:
    """The folder or file to evaluate, locked against a second evaluation; a folder's file stands for its folder.

    names: the folder's checkpoints, by default best.pt. output_dir: where results, log and lock go instead, made where
    it is missing; for places that cannot be written to. Raises ValueError or OSError.
    """
    if target.is_file() and names is not None:
        raise ValueError(f"--checkpoint {names[0]}: {target} is a checkpoint itself, not an experiment folder")
    if target.is_file() and is_checkpoint_of_its_folder(target):
        target, names = target.parent, [target.name]
    paths = [target] if target.is_file() else named_checkpoints(target, names or ["best"])
    if output_dir is not None:
        flags.check_writable(output_dir, "--output-dir")
        with naming("create", output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        beside = output_dir / target.resolve().name
    elif target.is_file():
        flags.check_writable(target.parent, "results are written beside (or give --output-dir)")
        beside = target
    else:
        flags.check_writable(target, "results are written to (or give --output-dir)")
        with Experiment.open(target, lock="eval", echo=tqdm.write) as experiment:
            yield Place(paths, Results(target / "autoattack"), experiment.log, {})
        return
    origin = {} if output_dir is None else {"target": str(target.resolve())}
    with _open_beside(beside, paths, origin) as place:
        yield place


@contextlib.contextmanager
def _open_beside(path: Path, checkpoints: list[Path], origin: dict[str, str]) -> Iterator[Place]:
    log_path = path.with_name(f"{path.name}.eval.log")

    def log(message: str) -> None:
        tqdm.write(message)
        write_log(log_path, message)

    check_log(log_path)
    lock_path = path.with_name(f".{path.name}.lock-eval")
    with naming("lock", lock_path):
        try:
            lock = take_lock(lock_path)
        except Locked as holder:
            raise FileError(f"{path} is in use: {holder} evaluates it") from None
    try:
        yield Place(checkpoints, Results(path.with_name(f"{path.name}.autoattack")), log, origin)
    finally:
        if lock is not None:
            lock.release()
