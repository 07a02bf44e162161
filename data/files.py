"""Prepared dataset files: uncompressed .npz with `image` (N,H,W,3) uint8 and `label` (N,) int64.

Written atomically, by one process at a time; read without trusting anything that the file says about itself.
"""

import fcntl
import io
import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

logger = logging.getLogger(__name__)

CHUNK = 1 << 24  # bytes read at a time
HEADER_LIMIT = 1 << 14  # NumPy's own headers take about 128 bytes


class Split(NamedTuple):
    """Images (N,H,W,3) uint8 and their labels (N,) int64, as torch tensors."""

    images: torch.Tensor
    labels: torch.Tensor


class DataFileError(ValueError):
    """A data file that cannot be used; the message is one line and names the file."""


class Member(NamedTuple):
    """One array of an .npz file, known from its headers alone."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    header_size: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file for reading; whatever zipfile or NumPy raise inside on bad content becomes a DataFileError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, DataFileError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: damaged, truncated or not an .npz file ({reason})") from error


def find_member(archive: zipfile.ZipFile, key: str) -> Member:
    """Read the headers of array `key`, and check that the member is as long as they say.

    Raises DataFileError for a missing key, object arrays, Fortran order and sizes that do not agree.
    """
    path = archive.filename
    names = archive.namelist()
    if f"{key}.npy" not in names:
        found = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:10]) or "nothing"
        raise DataFileError(f"{path}: no array '{key}' in it (found: {found})")
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        # Parsed from a bounded prefix: the length that a header gives for itself may be anything.
        prefix = io.BytesIO(stream.read(HEADER_LIMIT))
    version = np.lib.format.read_magic(prefix)
    if version not in [(1, 0), (2, 0)]:
        raise DataFileError(f"{path}: '{key}' has .npy format version {version}, this code reads (1, 0) and (2, 0)")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(prefix)
    if dtype.hasobject:
        raise DataFileError(f"{path}: '{key}' is an array of Python objects, which could run code when read: refused")
    if fortran_order and len(shape) > 1:
        raise DataFileError(f"{path}: '{key}' is stored in Fortran order, C order is needed")
    if any(length < 0 for length in shape):
        raise DataFileError(f"{path}: '{key}' has the impossible shape {shape}")
    member = Member(info, shape, dtype, prefix.tell())
    if member.header_size + member.nbytes != info.file_size:
        raise DataFileError(
            f"{path}: '{key}' claims shape {shape} of {dtype}, {member.nbytes} bytes, "
            f"but the file holds {info.file_size - member.header_size}"
        )
    return member


def _read_member(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    """Read a whole array; zipfile checks its CRC-32 on the way."""
    array = np.empty(member.shape, member.dtype)
    target = memoryview(array.reshape(-1).view(np.uint8))
    with archive.open(member.info) as stream:
        stream.read(member.header_size)
        done = 0
        while chunk := stream.read(CHUNK):
            target[done : done + len(chunk)] = chunk
            done += len(chunk)
    if done != member.nbytes:
        raise DataFileError(f"{archive.filename}: '{member.info.filename}' ends after {done} of {member.nbytes} bytes")
    return array


def read_arrays(path: str | os.PathLike, *, image_size: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read and check a prepared file: images (N,S,S,3) uint8 and labels (N,) int64 in [0, num_classes).

    Raises FileNotFoundError, or DataFileError (one line, names the file) for anything else that is wrong with it.
    """
    with open_npz(path) as archive:
        image, label = find_member(archive, "image"), find_member(archive, "label")
        wanted = (image_size, image_size, 3)
        if len(image.shape) != 4 or image.shape[1:] != wanted or image.dtype != np.uint8:
            raise DataFileError(f"{path}: 'image' is {image.shape} {image.dtype}, expected (N, *{wanted}) uint8")
        if label.shape != image.shape[:1] or label.dtype != np.int64 or not label.shape[0]:
            raise DataFileError(f"{path}: 'label' is {label.shape} {label.dtype}, expected ({image.shape[0]},) int64")
        images, labels = _read_member(archive, image), _read_member(archive, label)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataFileError(f"{path}: labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    return images, labels.astype(np.int64, copy=False)


def write_arrays(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray) -> None:
    """Write a prepared file: complete under its name, or not there at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            np.savez(stream, image=images, label=labels.astype(np.int64))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def preparing(folder: str | os.PathLike) -> Iterator[Path]:
    """Make `folder` and hold it for this process alone; remove what a killed process left half done (`*.tmp`).

    A second process waits here, and should then look whether the files it wanted have come into being.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another process prepares the data, waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: unique temporary names still keep the processes apart
            yield folder
            return
        for leftover in folder.glob("*.tmp"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with suppress(OSError):
                    leftover.unlink()
        yield folder
