"""The experiment folder: its settings, logs and metrics, its lock, and which checkpoint is which.

    args.yaml      every setting             latest.pt, previous.pt   where to resume, and the generation before
    train.log      what happened, and when   best.pt, epoch_0010.pt   what is evaluated
    metrics.csv    a row an epoch            autoattack.json, eval.log

For the scripts and for whatever reads a run. Every file but the logs is replaced as a whole (storage/files.py). Nothing
that is read is executed, and nothing that is refused is changed.
"""

import contextlib
import csv
import io
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import BaseFileLock

from experiment.checkpoint import NewerFormatError, load_checkpoint, save_checkpoint
from storage.files import (
    FileError,
    check_log,
    naming,
    one_line,
    read_text,
    sync_folder,
    temporary_name,
    write_log,
    write_text,
)
from storage.lock import Locked, take_lock

logger = logging.getLogger(__name__)

# What each kind of run holds: its lock, and the files that only it writes, whose abandoned halves it may clear away.
_LOCKS = {"train": (".lock", ("*.pt", "args.yaml", "metrics.csv")), "eval": (".lock-eval", ("*.json",))}
_MAX_SETTINGS_BYTES = 100_000
# How often a lock that another machine holds is tried, in seconds.
POLL = 1.0

# --- Settings ---------------------------------------------------------------------------------------------------------


class _SettingsLoader(yaml.SafeLoader):
    """yaml.safe_load without aliases, a few lines of which can stand for more than the memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(settings, sort_keys=False)
    write_text(path, text)


def _read_settings(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_SETTINGS_BYTES)
    try:
        settings = yaml.load(text, _SettingsLoader)
    # Beside YAMLError, its constructors let through ValueError, AttributeError, RecursionError and more.
    except Exception as error:
        raise FileError(f"{path}: not plain YAML ({one_line(error, 200)})") from error
    return _plain_settings(settings, path)


def _plain_settings(settings: Any, path: Path) -> dict[str, Any]:
    """`settings` with tuples as lists, checked to be a mapping of names to plain values or flat lists of those."""
    if not isinstance(settings, Mapping):
        raise FileError(f"{path}: must be a mapping of settings, is {type(settings).__name__}")
    result = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    for key, value in result.items():
        if type(key) is not str:
            raise FileError(f"{path}: the name of a setting must be text, not {str(key)[:50]!r}")
        for item in value if isinstance(value, list) else [value]:
            if type(item) not in (type(None), bool, int, float, str):
                accepted = "null, true, false, numbers, text and lists of those"
                raise FileError(f"{path}: {key!r} holds a {type(item).__name__}; accepted are {accepted}")
    return result


# --- The folder -------------------------------------------------------------------------------------------------------

Echo = Callable[[str], Any]


class InUse(FileError):
    """Another process holds the lock of a folder."""


class Loaded(NamedTuple):
    """What `Experiment.load_latest` found: the state, the file it came from, and why not latest.pt ("" if it was)."""

    state: dict[str, Any]
    path: Path
    note: str


class Experiment(contextlib.AbstractContextManager):
    """An experiment folder: `folder`, its `settings`, and for the one process that holds its lock, what it writes.

    From `create`, or from `open` with lock="train" (`log` writes train.log) or "eval" (eval.log): the two do not
    exclude each other, but each excludes its like, in any process. Without a lock it is for reading. A context manager:
    leaving it gives the lock back, as the end of the process does, however it ends.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], echo: Echo, lock: str | None, patience: float = 0.0
    ) -> None:
        self.folder = folder
        self.settings = settings
        self._echo = echo
        self._purpose = lock
        self._lock = None if lock is None else self._take_lock(lock, patience)
        self._latest_is_good = False

    @classmethod
    def create(
        cls, root: str | Path, name: str, settings: Mapping[str, Any], *, exist: str = "rename", echo: Echo = print
    ) -> "Experiment":
        """Make the folder `root`/`name` with its args.yaml, locked for training; one that exists is never touched.

        exist: where it exists, "rename" takes name-2, name-3, ..., and "error" raises; so does "adopt", but where a
        process was killed while it made the folder and has left nothing in it. settings: names -> None, bool, int,
        float, str or flat lists of those. echo: called with every message that is logged. Raises FileError.
        """
        if exist not in ("rename", "error", "adopt"):
            raise FileError(f"exist={exist!r}: accepted are 'rename', 'error' and 'adopt'")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise FileError(f"{name!r} cannot be the name of an experiment folder")
        root = Path(root)
        settings = _plain_settings(settings, root / name / "args.yaml")
        with naming("create", root):
            root.mkdir(parents=True, exist_ok=True)
        with naming("create", root / name):
            for number in itertools.count(1):
                folder = root / (name if number == 1 else f"{name}-{number}")
                try:
                    folder.mkdir()
                    break
                except FileExistsError:
                    if exist == "adopt" and _is_unbegun(folder):
                        break
                    if exist != "rename":
                        raise FileError(f"{folder} exists and is not overwritten; choose another name") from None
            sync_folder(root)
        try:
            experiment = cls(folder, settings, echo, "train")
        except InUse:
            raise  # by whoever has adopted it
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            _write_settings(folder / "args.yaml", settings)
        except BaseException:
            # Without its settings it is no experiment, and the next attempt would make another one beside it.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return experiment

    @classmethod
    def open(
        cls, folder: str | Path, *, lock: str | None = None, echo: Echo = print, patience: float = 0.0
    ) -> "Experiment":
        """Open an existing folder to read, or with lock="train" or "eval" to write what that kind of run writes.

        patience: for how many seconds to wait where a process on another machine holds the lock, which may be lost with
        its lock still there; what holds it here is alive. Raises FileError where the folder is no experiment, its
        args.yaml does not hold plain settings, or another process holds the lock.
        """
        folder = Path(folder)
        with naming("open", folder):
            if not folder.is_dir():
                raise FileError(f"{folder}: no such experiment folder")
            if not (folder / "args.yaml").exists():
                raise FileError(f"{folder}: not an experiment folder (no args.yaml in it)")
        return cls(folder, _read_settings(folder / "args.yaml"), echo, lock, patience)

    def _take_lock(self, purpose: str, patience: float) -> BaseFileLock | None:
        name, patterns = _LOCKS[purpose]
        check_log(self.folder / f"{purpose}.log")
        until, waits = time.monotonic() + patience, False
        while True:
            try:
                with naming("lock", self.folder / name):
                    lock = take_lock(self.folder / name)
                break
            except Locked as holder:
                what = f"{self.folder} is in use: {holder} has it for {purpose}"
                if not holder.elsewhere:
                    raise InUse(what) from None
                if time.monotonic() > until:
                    raise InUse(f"{what}, or that machine is lost and its lock has not ended yet") from None
                if not waits:
                    logger.warning("%s; waiting %g minutes at most, in case that machine is lost", what, patience / 60)
                waits = True
                time.sleep(POLL)
        # Without a lock, another process may be writing these.
        for abandoned in itertools.chain(*(self.folder.glob(f".{pattern}.*.tmp") for pattern in patterns)):
            if lock is not None:
                with contextlib.suppress(OSError):
                    abandoned.unlink()
        return lock

    def _require(self, *purposes: str) -> None:
        if self._purpose not in purposes:
            raise RuntimeError(f"{self.folder} is not open with the lock that this needs ({' or '.join(purposes)})")

    def close(self) -> None:
        """Give the lock back; what was written stays."""
        if self._lock is not None:
            self._lock.release()
        self._purpose, self._lock = None, None

    def __exit__(self, *_: object) -> None:
        self.close()

    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace args.yaml as a whole, for the settings that a resumed run may change. Raises FileError."""
        self._require("train")
        self.settings = _plain_settings(settings, self.folder / "args.yaml")
        _write_settings(self.folder / "args.yaml", self.settings)

    def log(self, message: str) -> None:
        """Echo `message`, and append it with the time to the log; it is on the disk when this returns."""
        self._require("train", "eval")
        self._echo(message)
        write_log(self.folder / f"{self._purpose}.log", message)

    # metrics.csv has a row an epoch, so it can be replaced as a whole for each: no crash leaves a torn row.

    def append_metrics(self, row: Mapping[str, bool | int | float | str | None]) -> None:
        """Add a row, on the disk when this returns. Columns keep their order, new ones come last, None leaves a blank.

        Raises TypeError for other values (a tensor, say), FileError where the file cannot be read or written.
        """
        self._require("train")
        for name, value in row.items():
            if not isinstance(value, bool | int | float | str | None):
                raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a plain value")
        columns, rows, _ = self._read_rows()
        self._write_rows([*columns, *(name for name in row if name not in columns)], [*rows, row])

    def truncate_metrics(self, keep: int | Callable[[dict[str, Any]], bool]) -> int:
        """Keep the first `keep` rows, or those for which `keep(row)` is true; returns how many whole ones went."""
        self._require("train")
        columns, rows, whole = self._read_rows()
        kept = rows[:keep] if isinstance(keep, int) else [row for row in rows if keep(_numbers(row))]
        if (self.folder / "metrics.csv").exists():
            self._write_rows(columns, kept)
        return whole - min(whole, len(kept))

    def read_metrics(self) -> list[dict[str, int | float | str | None]]:
        """The rows of metrics.csv but a torn one, numbers as numbers, blanks as None; none without a file."""
        return [_numbers(row) for row in self._read_rows()[1]]

    def _read_rows(self) -> tuple[list[str], list[dict[str, str]], int]:
        """The columns, the rows, and how many of them end in a line end, which the last may lack and nothing else."""
        path = self.folder / "metrics.csv"
        text = read_text(path) if path.exists() else ""
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        try:
            lines = _csv_lines(text[:end])
        except csv.Error as error:
            raise FileError(f"cannot read {path}: {error}") from error
        columns = lines[0] if lines else []
        separators = [name for name, mark in (("semicolons", ";"), ("tabs", "\t")) if any(mark in c for c in columns)]
        if separators:
            raise FileError(
                f"{path}: its columns are separated by {separators[0]}, not by commas: saved by a spreadsheet?"
            )
        for number, line in enumerate(lines, start=1):
            if len(line) != len(columns) or len(set(columns)) != len(columns):
                raise FileError(f"{path}: row {number} does not fit the {len(columns)} columns of the first")
        whole = max(len(lines) - 1, 0)
        with contextlib.suppress(csv.Error):
            lines += [line for line in _csv_lines(text[end:]) if len(line) == len(columns)]
        return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:]], whole

    def _write_rows(self, columns: list[str], rows: list[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self.folder / "metrics.csv", text.getvalue())

    def save_latest(self, state: dict[str, Any]) -> None:
        """Write latest.pt and keep the one before as previous.pt; one of the two is loadable at every instant."""
        self._require("train")
        save_checkpoint(self.folder / "latest.pt", state, before_rename=self._keep_older)
        self._latest_is_good = True

    def _keep_older(self) -> None:
        latest, previous = self.folder / "latest.pt", self.folder / "previous.pt"
        # A damaged latest.pt must not take the place of a good previous.pt.
        if not self._latest_is_good or not latest.exists():
            return
        link = temporary_name(previous)
        try:
            os.link(latest, link)
            os.replace(link, previous)
        except OSError:
            os.replace(latest, previous)  # No links on this file system: for an instant there is only previous.pt.
        finally:
            link.unlink(missing_ok=True)  # Renaming onto another link to the same file does nothing.

    def load_latest(self) -> Loaded | None:
        """latest.pt, or previous.pt where that is damaged or missing; None where neither exists (nothing saved yet).

        Raises FileError where what exists is damaged, and NewerFormatError rather than go back a generation.
        """
        paths = [self.folder / "latest.pt", self.folder / "previous.pt"]
        if not any(path.exists() for path in paths):
            return None
        problems = []
        for path in paths:
            try:
                state = load_checkpoint(path)
            except NewerFormatError:
                raise
            except FileError as error:
                problems.append(str(error))
            else:
                self._latest_is_good = not problems
                return Loaded(state, path, "; ".join(problems))
        raise FileError("no checkpoint to resume from: " + "; ".join(problems))

    def save_best(self, state: dict[str, Any]) -> None:
        """Write best.pt, as `save_checkpoint`."""
        self.save_named("best", state)

    def save_named(self, name: str, state: dict[str, Any]) -> None:
        """Write `name`.pt ("epoch_0010", say), as `save_checkpoint`."""
        self._require("train")
        save_checkpoint(self.folder / f"{name}.pt", state)


class Onlooker(Experiment):
    """A folder as those processes of a run have it that do not write: what is to be written is passed over."""

    def _pass_over(self, *_: Any) -> None:
        pass

    update_settings = append_metrics = save_latest = save_named = save_best = _pass_over

    def log(self, message: str) -> None:
        """Echo `message`."""
        self._echo(message)

    def truncate_metrics(self, keep: int | Callable[[dict[str, Any]], bool]) -> int:
        """Leave them as they are."""
        return 0


def _is_unbegun(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process leaves that was killed before it had written its settings."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"]
    return all(name == ".lock" or (name.startswith(".args.yaml.") and name.endswith(".tmp")) for name in names)


def named_checkpoints(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The files of a folder's checkpoints by their names, as every --checkpoint means them: best and best.pt are one.

    Raises FileError where the folder is no experiment, ValueError, with what is there, for a name that is not.
    """
    folder = Experiment.open(folder).folder
    there = sorted(path.name for path in folder.glob("*.pt"))
    paths = [folder / (name if name.endswith(".pt") else f"{name}.pt") for name in names]
    for name, path in zip(names, paths, strict=True):
        if path.name not in there or path.parent != folder:
            raise ValueError(f"--checkpoint {name}: {folder} has {', '.join(there) or 'no checkpoints'}")
    return list(dict.fromkeys(paths))


def is_checkpoint_of_its_folder(path: Path) -> bool:
    """Whether a file is a checkpoint in an experiment folder, and not just beside somebody's args.yaml."""
    if path.suffix != ".pt" or not (path.parent / "args.yaml").exists():
        return False
    try:
        return {"dataset", "model", "group_norm"} <= Experiment.open(path.parent).settings.keys()
    except FileError:
        return False


def _csv_lines(text: str) -> list[list[str]]:
    # Some programs leave an empty line at the end.
    return [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]


def _numbers(row: Mapping[str, str]) -> dict[str, int | float | str | None]:
    def value(text: str) -> int | float | str | None:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text or None

    return {name: value(text) for name, text in row.items()}
