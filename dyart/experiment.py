"""The experiment folder: settings, logs, metrics, checkpoints, results. The only code that touches its files.

    args.yaml      every setting             latest.pt, previous.pt   where to resume, and the generation before
    train.log      what happened, and when   best.pt, epoch_0010.pt   what is evaluated
    metrics.csv    a row an epoch            autoattack.json, eval.log

Every file but the logs is written beside, synced and renamed over the old one, so that a crash, a full disk or a lost
permission leaves the file that was there. Nothing that is read is executed, and nothing that is refused is changed.
Whatever is wrong with a file is an `ExperimentError` of one line that names the file.
"""

import contextlib
import csv
import difflib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import socket
import stat
import struct
import time
import warnings
import weakref
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import yaml

CHECKPOINT_FORMAT = 1
# What each kind of run holds: its lock, and the files that only it writes, whose abandoned halves it may clear away.
_LOCKS = {"train": (".lock", ("*.pt", "args.yaml", "metrics.csv")), "eval": (".lock-eval", ("*.json",))}
_MAX_SETTINGS_BYTES = 100_000


class ExperimentError(ValueError):
    """An experiment's file or folder cannot be used; the message is one line that names it and says why."""


class NewerFormatError(ExperimentError):
    """A checkpoint was written by a later version of this program: intact, but not ours to read or to replace."""


# --- Files ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(action: str, path: Path) -> Iterator[None]:
    """Turn the system's errors into one line that says what was tried and where."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(f"cannot {action} {path}: {error.strerror or error}") from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]


def _open(path: Path) -> BinaryIO:
    # Opening a pipe would wait for ever, and a device may have no end.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ExperimentError(f"cannot read {path}: not a regular file")
    return open(path, "rb")


def _read_text(path: Path, max_bytes: int = -1) -> str:
    with _naming("read", path), _open(path) as file:
        data = file.read(max_bytes)
        if file.read(1):
            raise ExperimentError(f"cannot read {path}: longer than {max_bytes} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ExperimentError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _write_file(path: Path, write: Callable[[BinaryIO], Any], before_rename: Callable[[], None] | None = None) -> None:
    """Write beside `path`, sync, and rename over it: afterwards it is all new, or on any failure all old."""
    temporary = _temporary(path)
    try:
        with _naming("write", path):
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if before_rename is not None:
                before_rename()
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    # Some network file systems cannot sync a folder; there the rename is as durable as they make it.
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, all of it or nothing. Raises ExperimentError, also for NaN and infinities."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"cannot write {path}: {error}") from error
    _write_file(Path(path), lambda file: file.write(text.encode()))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises ExperimentError where it is missing, unreadable or not JSON."""
    text = _read_text(Path(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"cannot read {path}: not JSON ({_one_line(error)})") from error


# --- Checkpoints ------------------------------------------------------------------------------------------------------

_SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def _digest(value: Any) -> str:
    """SHA-256 over the types, shapes and bytes of nested dicts, lists, tuples, dense tensors and plain values.

    Raises TypeError for anything else, which keeps out what `weights_only` would refuse to load.
    """
    seen: dict[int, bytes] = {}  # A crafted file may hold one list a million times, or inside itself.

    def walk(value: Any, where: str) -> bytes:
        if type(value) in _SCALARS:
            return hashlib.sha256(f"{type(value).__name__} {value!a}".encode()).digest()
        if id(value) in seen:
            if not seen[id(value)]:
                raise TypeError(f"{where} contains itself")
            return seen[id(value)]
        seen[id(value)] = b""
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise TypeError(f"{where} is not a dense tensor")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise TypeError(f"{where} {tuple(value.shape)} is larger than its storage (an expanded tensor)")
            content = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
            content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif type(value) in (dict, OrderedDict, Counter):
            content = hashlib.sha256(b"dict")
            for key, item in value.items():
                content.update(walk(key, f"a key of {where}") + walk(item, f"{where}[{key!r}]"))
        elif type(value) in (list, tuple, torch.Size):
            content = hashlib.sha256(b"list" if type(value) is list else b"tuple")
            for index, item in enumerate(value):
                content.update(walk(item, f"{where}[{index}]"))
        else:
            raise TypeError(f"{where} is a {type(value).__qualname__}, neither a tensor nor a plain value")
        seen[id(value)] = content.digest()
        return seen[id(value)]

    return walk(value, "state").hex()


def save_checkpoint(
    path: str | Path, state: dict[str, Any], *, before_rename: Callable[[], None] | None = None
) -> None:
    """Write `state` with the format's version and a checksum; on failure the file that was there stays as it is.

    `state` holds tensors (on any device), None, bool, int, float, str, bytes, and dicts, lists and tuples of those.
    `before_rename` is called when the new file is complete and not yet in place. Raises TypeError for other content,
    ExperimentError where the file cannot be written.
    """
    content = {**state, "format": CHECKPOINT_FORMAT}
    content["sha256"] = _digest({key: value for key, value in content.items() if key != "sha256"})

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch hides the system's error behind its own.
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError) else OSError(_one_line(error)) from None

    _write_file(Path(path), write, before_rename)


def load_checkpoint(path: str | Path, *, foreign: bool = False) -> dict[str, Any]:
    """The state of a checkpoint on the CPU, with its version under "format"; no code in the file is ever run.

    With `foreign`, also files that this program did not write: bare state dicts and the released code's checkpoints,
    in either of torch's file formats; numpy's numbers in them come back as Python's. A checksum is verified where there
    is one. Raises ExperimentError (NewerFormatError for a later version's checkpoint); the file is left alone.
    """
    path = Path(path)
    with _naming("read", path), _open(path) as file:
        try:
            state = _read_torch(file, foreign)
            _verify(state, foreign)
        except OSError:
            raise
        except ExperimentError as error:
            raise type(error)(f"{path}: {error}") from None
        # Of damaged bytes and hostile pickles the readers make errors of any type.
        except Exception as error:
            raise ExperimentError(f"{path}: {_reason(error)}") from error
    return state


def _read_torch(file: BinaryIO, foreign: bool) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            # torch stores its records as they are; others could expand to more than the memory holds.
            if sum(member.file_size for member in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise ExperimentError("not written by torch.save (its records are compressed or overlap)")
            # torch does not look at the CRCs, which are all that protects a foreign file.
            damaged = archive.testzip()
            if damaged is not None:
                raise ExperimentError(f"damaged (record {damaged!r})")
    elif not foreign:
        raise ExperimentError("not a checkpoint, or a truncated one")
    file.seek(0)
    with torch.serialization.safe_globals(_NUMPY_STAND_INS if foreign else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of old formats and odd pickles; what matters is an error, or in the content.
        return torch.load(file, map_location="cpu", weights_only=True)


def _verify(state: Any, foreign: bool) -> None:
    if not isinstance(state, dict):
        raise ExperimentError(f"not a checkpoint (it holds a {type(state).__name__})")
    version = state.get("format")
    ours = type(version) is int and "sha256" in state
    if not ours and not foreign:
        raise ExperimentError("not a checkpoint of this program (no format and checksum in it)")
    if ours and version > CHECKPOINT_FORMAT:
        raise NewerFormatError(f"format {version}, of a later version; this one reads up to {CHECKPOINT_FORMAT}")
    checksum = state.pop("sha256") if ours else None
    if _digest(state) != checksum and ours:  # Of foreign files, the digest only checks what they hold.
        raise ExperimentError("damaged (its checksum does not match its content)")


def _reason(error: Exception) -> str:
    """torch's page of advice, some of it dangerous, as half a line."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is not None:
        return f"refused: it names {found[1]}, and only tensors and plain values are loaded"
    reason = _one_line(str(error).rpartition("WeightsUnpickler error: ")[2]) or type(error).__name__
    return f"not a checkpoint, or a damaged one ({reason})"


class _NumpyDtype:
    """Stands for numpy.dtype while a foreign checkpoint is read: numpy's own trusts what a pickle tells it."""

    def __init__(self, code: str, *_: Any) -> None:
        formats = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
        self.format = (formats | {"f2": "e", "f4": "f", "f8": "d"})[code]
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].replace("|", "=")


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> bool | int | float:
    return struct.unpack(dtype.order + dtype.format, data)[0]


_NUMPY_STAND_INS = [
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]


# --- Settings ---------------------------------------------------------------------------------------------------------


class _SettingsLoader(yaml.SafeLoader):
    """yaml.safe_load without aliases, a few lines of which can stand for more than the memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(settings, sort_keys=False)
    _write_file(path, lambda file: file.write(text.encode()))


def _read_settings(path: Path) -> dict[str, Any]:
    text = _read_text(path, _MAX_SETTINGS_BYTES)
    try:
        settings = yaml.load(text, _SettingsLoader)
    # Beside YAMLError, its constructors let through ValueError, AttributeError, RecursionError and more.
    except Exception as error:
        raise ExperimentError(f"{path}: not plain YAML ({_one_line(error)})") from error
    return _plain_settings(settings, path)


def _plain_settings(settings: Any, path: Path) -> dict[str, Any]:
    """`settings` with tuples as lists, checked to be a mapping of names to plain values or flat lists of those."""
    if not isinstance(settings, Mapping):
        raise ExperimentError(f"{path}: must be a mapping of settings, is {type(settings).__name__}")
    result = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    for key, value in result.items():
        if type(key) is not str:
            raise ExperimentError(f"{path}: the name of a setting must be text, not {str(key)[:50]!r}")
        for item in value if isinstance(value, list) else [value]:
            if type(item) not in (type(None), bool, int, float, str):
                accepted = "null, true, false, numbers, text and lists of those"
                raise ExperimentError(f"{path}: {key!r} holds a {type(item).__name__}; accepted are {accepted}")
    return result


def check_settings(
    settings: Mapping[str, Any], spec: Mapping[str, type | tuple[type, ...]], source: str | Path = "args.yaml"
) -> None:
    """Hold `settings` against the type, or types, that `spec` gives for every name (type(None): may be null).

    An int passes for a float; a bool passes for neither. Raises ExperimentError, one line with everything that is
    unknown (and the nearest known name), missing or ill-typed; `source` is the file it names.
    """
    problems = [f"setting {key!r} is missing" for key in spec if key not in settings]
    for key, value in settings.items():
        if key not in spec:
            near = difflib.get_close_matches(key, spec, n=1)
            problems.append(f"unknown setting {key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
            continue
        types = spec[key] if isinstance(spec[key], tuple) else (spec[key],)
        if type(value) not in types and not (type(value) is int and float in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            problems.append(f"{key!r} must be {names}, is {str(value)[:50]!r} ({type(value).__name__})")
    if problems:
        raise ExperimentError(f"{source}: " + "; ".join(problems))


# --- The folder -------------------------------------------------------------------------------------------------------

# A forked child shares its parent's locks and would hold them beyond the parent's death.
_held_locks: "weakref.WeakSet[BinaryIO]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(_held_locks)])

Echo = Callable[[str], Any]


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

    def __init__(self, folder: Path, settings: dict[str, Any], echo: Echo, lock: str | None) -> None:
        self.folder = folder
        self.settings = settings
        self._echo = echo
        self._purpose = lock
        self._lock = None if lock is None else self._take_lock(lock)
        self._latest_is_good = False

    @classmethod
    def create(
        cls, root: str | Path, name: str, settings: Mapping[str, Any], *, exist: str = "rename", echo: Echo = print
    ) -> "Experiment":
        """Make the folder `root`/`name` with its args.yaml, locked for training; one that exists is never touched.

        exist: where it exists, "rename" takes name-2, name-3, ..., and "error" raises. settings: names -> None, bool,
        int, float, str or flat lists of those. echo: called with every message that is logged. Raises ExperimentError.
        """
        if exist not in ("rename", "error"):
            raise ExperimentError(f"exist={exist!r}: accepted are 'rename' and 'error'")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ExperimentError(f"{name!r} cannot be the name of an experiment folder")
        root = Path(root)
        settings = _plain_settings(settings, root / name / "args.yaml")
        with _naming("create", root):
            root.mkdir(parents=True, exist_ok=True)
        with _naming("create", root / name):
            for number in itertools.count(1):
                folder = root / (name if number == 1 else f"{name}-{number}")
                try:
                    folder.mkdir()
                    break
                except FileExistsError:
                    if exist == "error":
                        raise ExperimentError(f"{folder} exists and is not overwritten; choose another name") from None
            _sync_folder(root)
        experiment = cls(folder, settings, echo, "train")
        _write_settings(folder / "args.yaml", settings)
        return experiment

    @classmethod
    def open(cls, folder: str | Path, *, lock: str | None = None, echo: Echo = print) -> "Experiment":
        """Open an existing folder to read, or with lock="train" or "eval" to write what that kind of run writes.

        Raises ExperimentError where it is no experiment folder, its args.yaml does not hold plain settings, or another
        process holds the lock.
        """
        folder = Path(folder)
        with _naming("open", folder):
            if not folder.is_dir():
                raise ExperimentError(f"{folder}: no such experiment folder")
            if not (folder / "args.yaml").exists():
                raise ExperimentError(f"{folder}: not an experiment folder (no args.yaml in it)")
        return cls(folder, _read_settings(folder / "args.yaml"), echo, lock)

    def _take_lock(self, purpose: str) -> BinaryIO:
        name, patterns = _LOCKS[purpose]
        with _naming("lock", self.folder / name), contextlib.ExitStack() as on_error:
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            lock = on_error.enter_context(open(descriptor, "r+b", buffering=0))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _one_line(lock.read(200).decode(errors="replace")) or "another process"
                raise ExperimentError(f"{self.folder} is in use: {holder} has it for {purpose}") from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            on_error.pop_all()
        _held_locks.add(lock)
        for abandoned in itertools.chain(*(self.folder.glob(f".{pattern}.*.tmp") for pattern in patterns)):
            with contextlib.suppress(OSError):
                abandoned.unlink()
        return lock

    def _require(self, *purposes: str) -> None:
        if self._purpose not in purposes:
            raise RuntimeError(f"{self.folder} is not open with the lock that this needs ({' or '.join(purposes)})")

    def close(self) -> None:
        """Give the lock back; what was written stays."""
        if self._lock is not None:
            self._lock.close()
        self._purpose, self._lock = None, None

    def __exit__(self, *_: object) -> None:
        self.close()

    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace args.yaml as a whole, for the settings that a resumed run may change. Raises ExperimentError."""
        self._require("train")
        self.settings = _plain_settings(settings, self.folder / "args.yaml")
        _write_settings(self.folder / "args.yaml", self.settings)

    def log(self, message: str) -> None:
        """Echo `message`, and append it with the time to the log; it is on the disk when this returns."""
        self._require("train", "eval")
        self._echo(message)
        path = self.folder / f"{self._purpose}.log"
        with _naming("write", path), open(path, "ab", buffering=0) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n".encode(errors="backslashreplace"))
            os.fsync(file.fileno())

    # metrics.csv has a row an epoch, so it can be replaced as a whole for each: no crash leaves a torn row.

    def append_metrics(self, row: Mapping[str, bool | int | float | str | None]) -> None:
        """Add a row, on the disk when this returns. Columns keep their order, new ones come last, None leaves a blank.

        Raises TypeError for other values (a tensor, say), ExperimentError where the file cannot be read or written.
        """
        self._require("train")
        for name, value in row.items():
            if not isinstance(value, bool | int | float | str | None):
                raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a plain value")
        columns, rows = self._read_rows()
        self._write_rows([*columns, *(name for name in row if name not in columns)], [*rows, row])

    def truncate_metrics(self, keep: int | Callable[[dict[str, Any]], bool]) -> int:
        """Keep the first `keep` rows, or those for which `keep(row)` is true, no torn one; returns how many went."""
        self._require("train")
        columns, rows = self._read_rows()
        kept = rows[:keep] if isinstance(keep, int) else [row for row in rows if keep(_numbers(row))]
        if (self.folder / "metrics.csv").exists():
            self._write_rows(columns, kept)
        return len(rows) - len(kept)

    def read_metrics(self) -> list[dict[str, int | float | str | None]]:
        """The complete rows of metrics.csv, numbers as numbers and blanks as None; none where there is no file yet."""
        return [_numbers(row) for row in self._read_rows()[1]]

    def _read_rows(self) -> tuple[list[str], list[dict[str, str]]]:
        path = self.folder / "metrics.csv"
        text = _read_text(path) if path.exists() else ""
        try:
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""), strict=True))
        except csv.Error as error:
            raise ExperimentError(f"cannot read {path}: {error}") from error
        columns = lines[0] if lines else []
        for number, line in enumerate(lines, start=1):
            if len(line) != len(columns) or len(set(columns)) != len(columns):
                raise ExperimentError(f"{path}: row {number} does not fit the {len(columns)} columns of the first")
        return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:]]

    def _write_rows(self, columns: list[str], rows: list[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        _write_file(self.folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))

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
        link = _temporary(previous)
        try:
            os.link(latest, link)
            os.replace(link, previous)
        except OSError:
            os.replace(latest, previous)  # No links on this file system: for an instant there is only previous.pt.
        finally:
            link.unlink(missing_ok=True)  # Renaming onto another link to the same file does nothing.

    def load_latest(self) -> Loaded | None:
        """latest.pt, or previous.pt where that is damaged or missing; None where neither exists (nothing saved yet).

        Raises ExperimentError where what exists is damaged, and NewerFormatError rather than go back a generation.
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
            except ExperimentError as error:
                problems.append(str(error))
            else:
                self._latest_is_good = not problems
                return Loaded(state, path, "; ".join(problems))
        raise ExperimentError("no checkpoint to resume from: " + "; ".join(problems))

    def save_best(self, state: dict[str, Any]) -> None:
        """Write best.pt, as `save_checkpoint`."""
        self.save_named("best", state)

    def save_named(self, name: str, state: dict[str, Any]) -> None:
        """Write `name`.pt ("epoch_0010", say), as `save_checkpoint`."""
        self._require("train")
        save_checkpoint(self.folder / f"{name}.pt", state)


def _numbers(row: Mapping[str, str]) -> dict[str, int | float | str | None]:
    def value(text: str) -> int | float | str | None:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text or None

    return {name: value(text) for name, text in row.items()}
