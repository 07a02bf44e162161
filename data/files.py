"""Prepared dataset files: uncompressed .npz with `image` (N,H,W,3) uint8 and `label` (N,) int64.

Written atomically, by one process at a time; read without trusting anything that a file says about itself.
"""

import errno
import hashlib
import io
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from storage.files import FileError, describe_content, naming, one_line, replacing
from storage.lock import Locked, take_lock

logger = logging.getLogger(__name__)

CHUNK = 1 << 24  # bytes read at a time
HEADER_LIMIT = 1 << 14  # bytes; NumPy's own .npy headers take 128
DEFLATE_LIMIT = 1032  # deflate, which numpy.savez_compressed uses, cannot expand its input by more


class Split(NamedTuple):
    """Images (N,H,W,3) uint8 and their labels (N,) int64, as torch tensors."""

    images: torch.Tensor
    labels: torch.Tensor


def in_memory(images: Any) -> torch.Tensor:
    """Images (N,H,W,3) uint8 as a tensor; those that stay on disk (data/stored.py) are read."""
    return images if isinstance(images, torch.Tensor) else images.read()


def digest(split: Split) -> str:
    """SHA-256 of a split's images and labels, which tells whether two are the same data."""
    step = max(1, CHUNK // max(1, math.prod(split.images.shape[1:])))
    blocks = (in_memory(split.images[i : i + step]).contiguous().numpy() for i in range(0, len(split.labels), step))
    return digest_of(blocks, split.images.shape, split.labels.contiguous().numpy())


def digest_of(blocks: Iterable[np.ndarray], shape: Iterable[int], labels: np.ndarray) -> str:
    """`digest` of images (N,H,W,3) uint8 of this shape that come some at a time."""
    content = hashlib.sha256(f"{tuple(shape)}".encode())
    for block in blocks:
        content.update(block)
    content.update(labels.astype("<i8"))
    return content.hexdigest()


class DataFileError(FileError):
    """A data file that cannot be used; the message is one line and names the file."""


class Member(NamedTuple):
    """One array of an .npz file, as its headers describe it."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    header_size: int  # bytes before the array's own

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def compressed(self) -> bool:
        """Whether the array has to be decompressed to be read."""
        return self.info.compress_type != zipfile.ZIP_STORED


def is_bad_content(error: Exception) -> bool:
    """Whether an exception met while reading a file tells of its content, and not of the disk or of permissions.

    zipfile, zlib, NumPy and Pillow raise a dozen types on damaged bytes; zipfile, on wrong offsets, even EINVAL.
    """
    return not isinstance(error, OSError) or error.errno == errno.EINVAL


# How the archives begin in which data comes.
_ARCHIVES = {".zip": b"PK", ".npz": b"PK", ".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b"}


def other_kind(path: str | os.PathLike, suffix: str | None = None) -> str | None:
    """What a file is, in words, where it does not even begin as an archive of its name's suffix; None if not known."""
    beginning = _ARCHIVES.get(suffix or Path(path).suffix, b"PK")
    try:
        with open(path, "rb") as file:
            begins = file.read(len(beginning)) == beginning
    except OSError:
        return None
    return None if begins else describe_content(path)


@contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file for reading; whatever zipfile or NumPy raise inside on bad content becomes a DataFileError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataFileError:
        raise
    except Exception as error:
        if not is_bad_content(error):
            raise
        if what := other_kind(path, ".npz"):
            raise DataFileError(f"{path}: not an .npz file but {what}") from error
        raise DataFileError(f"{path}: damaged, truncated or not an .npz file ({one_line(error)})") from error


def read_npy_header(stream: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read the header at the start of an .npy stream; return shape, dtype and the header's size in bytes.

    Raises DataFileError, beginning with `name`, for arrays of objects, Fortran order and unknown format versions.
    """
    # Parsed from a bounded prefix, as the length that a header gives for itself may be anything.
    prefix = io.BytesIO(stream.read(HEADER_LIMIT))
    version = np.lib.format.read_magic(prefix)
    if version not in [(1, 0), (2, 0)]:
        raise DataFileError(f"{name} has .npy format version {version}, expected (1, 0) or (2, 0)")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(prefix)
    if dtype.hasobject:
        raise DataFileError(f"{name} holds Python objects, which may run code when read: refused")
    if fortran_order and len(shape) > 1:
        raise DataFileError(f"{name} is stored in Fortran order, expected C order")
    if any(length < 0 for length in shape):
        raise DataFileError(f"{name} has the impossible shape {shape}")
    return shape, dtype, prefix.tell()


def find_member(archive: zipfile.ZipFile, key: str) -> Member:
    """Read the headers of array `key`, and check them against each other and against the size of the file.

    Raises DataFileError for a missing key, for what `read_npy_header` refuses, and for sizes that cannot be true.
    """
    path = archive.filename
    names = archive.namelist()
    if f"{key}.npy" not in names:
        found = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:10]) or "nothing"
        raise DataFileError(f"{path}: no array '{key}' in it, found {found}")
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataFileError(
            f"{path}: '{key}' has zip compression {info.compress_type}, expected none (0) or deflate (8)"
        )
    largest = info.compress_size * (DEFLATE_LIMIT if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.header_offset + info.compress_size > os.path.getsize(path) or info.file_size > largest:
        raise DataFileError(f"{path}: '{key}' claims {info.file_size} bytes, more than the file can hold")
    with archive.open(info) as stream:
        shape, dtype, header_size = read_npy_header(stream, f"{path}: '{key}'")
    member = Member(info, shape, dtype, header_size)
    held = info.file_size - header_size
    if member.nbytes != held:
        raise DataFileError(f"{path}: '{key}' claims {shape} {dtype}, {member.nbytes} bytes, but {held} are there")
    return member


def read_chunks(archive: zipfile.ZipFile, member: Member) -> Iterator[bytes]:
    """Yield the bytes of an array, at most CHUNK at a time, CHUNK being a multiple of every item size.

    Raises DataFileError if it ends early; zipfile checks its CRC-32 on the way.
    """
    done = 0
    with archive.open(member.info) as stream:
        stream.read(member.header_size)
        while chunk := stream.read(CHUNK):
            done += len(chunk)
            yield chunk
    if done != member.nbytes:
        raise DataFileError(f"{archive.filename}: '{member.info.filename}' ends after {done} of {member.nbytes} bytes")


def read_array(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    """An array of an .npz file. Raises DataFileError if it ends early."""
    array = np.empty(member.shape, member.dtype)
    flat = array.reshape(-1).view(np.uint8)
    done = 0
    for chunk in read_chunks(archive, member):
        flat[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    return array


def read_split(path: str | os.PathLike, *, image_size: int, num_classes: int) -> Split:
    """Read and check a prepared file: images (N,S,S,3) uint8 and labels (N,) int64 in [0, num_classes).

    Raises FileNotFoundError, or DataFileError for anything that is wrong with its content.
    """
    with open_npz(path) as archive:
        image, label = find_member(archive, "image"), find_member(archive, "label")
        if len(image.shape) != 4 or image.shape[1:] != (image_size, image_size, 3) or image.dtype != np.uint8:
            raise DataFileError(
                f"{path}: 'image' is {image.shape} {image.dtype}, expected (N, {image_size}, {image_size}, 3) uint8"
            )
        if label.shape != image.shape[:1] or label.dtype != np.int64:
            raise DataFileError(f"{path}: 'label' is {label.shape} {label.dtype}, expected ({image.shape[0]},) int64")
        if image.shape[0] == 0:
            raise DataFileError(f"{path}: holds no images")
        images, labels = read_array(archive, image), read_array(archive, label)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataFileError(f"{path}: labels {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64, copy=False)))


def write_split(path: str | os.PathLike, split: Split) -> None:
    """Write a prepared file, atomically. The same split gives the same bytes."""
    with naming("write", path), replacing(path) as stream:
        np.savez(stream, image=split.images.numpy(), label=split.labels.numpy())


@contextmanager
def preparing(folder: str | os.PathLike) -> Iterator[Path]:
    """Make `folder`, which is for our files only, and hold it for this process; a second one waits here.

    Removes what a killed process left half done (`*.tmp`). Whoever had to wait should look whether the files that it
    wanted have come into being.
    """
    folder = Path(folder)
    with naming("prepare data (elsewhere: --data-dir, --cache-dir) in", folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = take_lock(folder / ".lock")
        except Locked as holder:
            logger.warning("%s: %s prepares the data here, waiting for it", folder, holder)
            lock = take_lock(folder / ".lock", wait=True)
    try:
        # Where there are no locks, unique names keep processes apart, and what lies here may be another one's.
        for leftover in folder.glob("*.tmp") if lock is not None else ():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with suppress(OSError):
                    leftover.unlink()
        yield folder
    finally:
        if lock is not None:
            lock.release()
