"""Generated training images: .npz files of up to 50 million images, read from disk a batch at a time.

As published for DDPM (Rebuffi et al., 2021; Gowal et al., 2021) and EDM (Wang et al., 2023): `image` (N,H,W,3) uint8
and `label` (N,); other keys are ignored.
"""

import hashlib
import logging
import os
import shutil
import struct
import weakref
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.files import (
    DataFileError,
    Member,
    Split,
    find_member,
    open_npz,
    preparing,
    read_chunks,
    read_npy_header,
)
from storage.files import FileError, naming, replacing

logger = logging.getLogger(__name__)


class Auxiliary:
    """Generated images (N,H,W,3) uint8 that stay on disk, and their labels (N,) in the smallest type that holds them.

    Rows are read with pread and not through a memory map: the pages that random access to a map touches count as
    resident memory of this process, up to the size of the file.
    """

    def __init__(self, path: str | os.PathLike, offset: int, image_shape: tuple[int, int, int], labels: np.ndarray):
        self.path = Path(path)
        self.offset = offset  # bytes of the file before the first image
        self.image_shape = tuple(image_shape)
        self.labels = labels
        with naming("read", self.path):
            self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)  # open as long as this object lives
        self._status = _status(os.fstat(self._file))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def rows(self, index: np.ndarray) -> Split:
        """Read the images and labels at `index` (n,), in that order; for several threads at a time.

        Raises FileError if the file cannot be read, is gone, or is no longer the one that was opened.
        """
        images = np.empty((len(index), *self.image_shape), np.uint8)
        size = images[0].nbytes if len(index) else 0
        with naming("read", self.path):
            for position in np.argsort(index):  # in the order of the file, which disks prefer
                at = self.offset + int(index[position]) * size
                if os.preadv(self._file, [images[position]], at) != size:
                    raise DataFileError(f"{self.path}: no longer holds image {index[position]}: was it changed?")
            # Afterwards, so that nothing is trained on that was changed before it was read.
            if _status(os.stat(self.path)) != self._status:
                raise DataFileError(f"{self.path}: was replaced or changed since it was opened")
        return Split(torch.from_numpy(images), torch.from_numpy(self.labels[index].astype(np.int64)))


def _status(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to, or another one takes its name."""
    return status.st_size, status.st_mtime_ns


def load_auxiliary(
    path: str | os.PathLike,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    cache_dir: str | os.PathLike | None = None,
) -> Auxiliary:
    """Open generated data, having checked shapes, types, sizes and every label, without reading the images.

    An uncompressed `image` member is read in place. A compressed one is first converted, once, to
    <path>.converted/image-<key>.npy (or below `cache_dir`); the key tells the content, so that a changed file is
    converted again. Memory: one byte an image for the labels (for up to 256 classes), and buffers of 16 MiB.

    Raises FileNotFoundError, DataFileError (one line that names the file) for bad content, OSError for a full disk.
    """
    path = Path(path)
    with open_npz(path) as archive:
        image, label = find_member(archive, "image"), find_member(archive, "label")
        if image.shape[1:] != tuple(image_shape) or image.dtype != np.uint8:
            wanted = ", ".join(map(str, image_shape))
            raise DataFileError(f"{path}: 'image' is {image.shape} {image.dtype}, expected (N, {wanted}) uint8")
        if label.shape != image.shape[:1] or label.dtype.kind not in "iu":
            raise DataFileError(
                f"{path}: 'label' is {label.shape} {label.dtype}, expected ({image.shape[0]},) integers"
            )
        if image.shape[0] == 0:
            raise DataFileError(f"{path}: holds no images")
        labels = _read_labels(archive, label, num_classes)
        if image.compressed:
            folder = Path(cache_dir or path.parent) / f"{path.name}.converted"
            try:
                images_path, offset = _convert(archive, image, folder)
            except FileError as error:
                raise DataFileError(
                    f"{error}; {path} is compressed: its copy can go elsewhere (--cache-dir)"
                ) from error
        else:
            images_path, offset = path, _data_offset(path, image)
    return Auxiliary(images_path, offset, image_shape, labels)


def content_of(path: str | os.PathLike) -> str:
    """What tells generated data wherever the file lies: sizes and CRC-32 of its arrays, from the zip's directory."""
    with open_npz(path) as archive:
        members = [find_member(archive, key).info for key in ("image", "label")]
    return "/".join(f"{info.file_size}-{info.CRC:08x}" for info in members)


def _read_labels(archive: zipfile.ZipFile, member: Member, num_classes: int) -> np.ndarray:
    labels = np.empty(member.shape, np.min_scalar_type(num_classes - 1))
    done = 0
    for chunk in read_chunks(archive, member):
        values = np.frombuffer(chunk, member.dtype)
        if values.min() < 0 or values.max() >= num_classes:
            raise DataFileError(
                f"{archive.filename}: labels {values.min()} to {values.max()}, expected 0 to {num_classes - 1}"
            )
        labels[done : done + len(values)] = values
        done += len(values)
    return labels


def _data_offset(path: Path, member: Member) -> int:
    """Where the array's bytes begin in the file: after the zip's local header, its two fields, and the .npy header."""
    with open(path, "rb") as stream:
        stream.seek(member.info.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", stream.read(30))
    return member.info.header_offset + 30 + name_length + extra_length + member.header_size


def _convert(archive: zipfile.ZipFile, member: Member, folder: Path) -> tuple[Path, int]:
    """Decompress an array into an .npy file in `folder`, unless it is there; return the file and its header's size."""
    info = member.info
    key = hashlib.sha256(f"{info.CRC} {info.file_size} {info.compress_size}".encode()).hexdigest()[:16]
    target = folder / f"image-{key}.npy"
    if (offset := _converted_offset(target, member)) is not None:
        return target, offset
    with preparing(folder):
        if (offset := _converted_offset(target, member)) is not None:  # another process made it while this one waited
            return target, offset
        free = shutil.disk_usage(folder).free
        if free < member.nbytes:
            raise OSError(
                f"{folder}: {archive.filename} needs {member.nbytes} bytes decompressed, {free} are free "
                "(elsewhere: --cache-dir)"
            )
        logger.warning("%s is compressed: converting it, once, to %s", archive.filename, target)
        with (
            naming("write", target),
            replacing(target) as stream,
            tqdm(total=member.nbytes, unit="B", unit_scale=True, desc="converting") as bar,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": member.shape}
            np.lib.format.write_array_header_1_0(stream, header)
            offset = stream.tell()
            for chunk in read_chunks(archive, member):
                stream.write(chunk)
                bar.update(len(chunk))
    return target, offset


def _converted_offset(target: Path, member: Member) -> int | None:
    """Header size of a converted file, or None if it is not there or not what `member` would give."""
    try:
        with open(target, "rb") as stream:
            shape, dtype, offset = read_npy_header(stream, str(target))
        intact = shape == member.shape and dtype == member.dtype and target.stat().st_size == offset + member.nbytes
    except (FileNotFoundError, ValueError):
        return None
    return offset if intact else None
