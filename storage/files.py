"""Files that are written so that a crash leaves the old or the new one, and read without trusting what they say.

For whoever keeps files: datasets, experiment folders, results. A file is written beside, synced and renamed over the
old one, so that a crash, a full disk or a lost permission leaves the file that was there. Whatever is wrong with a file
is a `FileError` of one line that names it.
"""

import contextlib
import csv
import io
import json
import os
import pwd
import re
import secrets
import stat
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO


class FileError(ValueError):
    """A file or folder cannot be used; the message is one line that names it and says why."""


@contextlib.contextmanager
def naming(action: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn the system's errors into a FileError that says what was tried and where."""
    try:
        yield
    except OSError as error:
        raise FileError(f"cannot {action} {path}: {error.strerror or error}") from error


def one_line(message: object, most: int | None = None) -> str:
    """A message, or an exception's (its type where it has none), on one line of at most `most` characters."""
    return " ".join(str(message).split())[:most] or type(message).__name__


def few(names: Sequence[str], most: int = 3) -> str:
    """The first few of a list of names, and how many there are beside them."""
    beside = len(names) - most
    return ", ".join(names[:most]) + (f" and {beside} more" if beside > 0 else "")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises FileError for a pipe, which would wait for ever, and for a device."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileError(f"cannot read {path}: not a regular file")
    return open(path, "rb")


def read_text(path: Path, max_bytes: int = -1) -> str:
    """A file's content, which is to be UTF-8, less a byte order mark. Raises FileError, also beyond `max_bytes`."""
    with naming("read", path), open_regular(path) as file:
        data = file.read(max_bytes)
        if file.read(1):
            raise FileError(f"cannot read {path}: longer than {max_bytes} bytes")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from error


# How files begin that people have where another is expected, and what to do about them.
_BEGINNINGS = [
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: fetch that with git lfs pull"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF-", "a PDF document"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x08\x01\x12", "a SavedModel of TensorFlow"),
]
# An ONNX model: the version of the format, and the name of the program that wrote it.
_ONNX = re.compile(rb"\x08[\x03-\x20]\x12.[ -~]{3}", re.DOTALL)
# How the index of a TensorFlow checkpoint ends.
_INDEX_END = bytes.fromhex("57fb808b247547db")


def describe_content(path: str | os.PathLike) -> str | None:
    """What a file is by its content, in words and with what to do, if it is a kind that is often taken for another.

    None for what is not known, and for files that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(max(os.fstat(file.fileno()).st_size - len(_INDEX_END), 0))
            tail = file.read(len(_INDEX_END))
    except OSError:
        return None
    if not head:
        return "an empty file"
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    if re.match(rb"\s*(<!doctype html|<html|<\?xml)", head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
        return "a web page: the download was answered by a page, for a log-in or an error perhaps"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if _ONNX.match(head):
        return "an ONNX model"
    if tail == _INDEX_END:
        return "the index of a TensorFlow checkpoint"
    if head.startswith(b"PK"):
        return _describe_zip(path)
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text, which begins {one_line(head[:40].decode())!r}"
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
    is_torch = head[2:14] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P"  # the magic number of torch's older format
    return "a pickle that torch.save did not write" if is_pickle and not is_torch else None


def _describe_zip(path: str | os.PathLike) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # Of damaged directories zipfile makes errors of any type.
        return None
    if "model.weights.h5" in names:
        return "a model of Keras"
    last = {name.rpartition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)"
    if "constants.pkl" in last:
        return "a TorchScript archive: save its state_dict() by torch.save"
    return None if "data.pkl" in last else "a zip archive: unpack it first"


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header that fits into the file, and an object."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        return head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8
    except OSError:
        return False


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else takes; what is left of it after a crash can be told by `.*.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, before_rename: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes its name `path` only when it is complete and on disk; on an error all is as before.

    before_rename: called when the new file is complete and not yet in place. Raises OSError.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename()
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as a whole, or on any failure leave the one that was there. Raises FileError."""
    with naming("write", path), replacing(path) as file:
        file.write(content)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text as `utf8` makes it."""
    write_bytes(path, utf8(text))


def utf8(text: str) -> bytes:
    """Text in UTF-8, whatever the locale; bytes in the names of files that are no UTF-8 become escapes.

    In a locale without UTF-8, Python holds the bytes of such names as surrogates.
    """
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace").encode()


def write_log(path: Path, message: str) -> None:
    """Append a line with the time to a log; it is on the disk when this returns. Raises FileError."""
    with naming("write", path), open(path, "ab", buffering=0) as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n".encode(errors="backslashreplace"))
        os.fsync(file.fileno())


def check_log(path: Path) -> None:
    """Raise FileError where a log exists that this user may not write to, before the work that is to be logged."""
    if path.exists() and not os.access(path, os.W_OK, effective_ids=True):
        raise FileError(f"cannot write {path}: Permission denied ({owner_of(path)})")


def owner_of(path: str | os.PathLike) -> str:
    """Whose an existing file is that this user may not write to, and what to do."""
    status = os.stat(path)
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    return f"it belongs to {owner}, with mode {status.st_mode & 0o777:o}: chmod g+w or remove it"


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    # Some network file systems cannot sync a folder; there the rename is as durable as they make it.
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, all of it or nothing. Raises FileError, also for NaN and infinities."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FileError(f"cannot write {path}: {error}") from error
    write_text(path, text)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write at least one row, all with the same columns, as CSV, all of it or nothing. Raises FileError."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises FileError where it is missing, unreadable or not JSON."""
    text = read_text(Path(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: not JSON ({one_line(error, 200)})") from error
