"""Images in an .npz file as MedMNIST publishes them: `train_images`, `train_labels`, and `val_...`, `test_...`."""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.files import DataFileError, Member, find_member, open_npz, read_array, read_chunks
from data.pictures import Picture, to_picture
from storage.files import few

# The arrays of each part begin with this.
PREFIXES = {"train": "train", "validation": "val", "test": "test"}


class ImageArchive:
    """An .npz file of images: classes "0", "1", ... and labels (N,) of each part (train, validation, test).

    Images are (N,H,W) or (N,H,W,3) uint8, labels (N,) or (N,1) whole numbers from 0 on. Without test images those of
    val are the test images. fingerprint: of the checksums in the file. Raises DataFileError for what cannot be trained
    on.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.notes: list[str] = []
        fingerprint = hashlib.sha256(b"npz 1")
        self._images: dict[str, Member] = {}
        self.labels: dict[str, np.ndarray] = {}
        with open_npz(self.path) as archive:
            there = {name.removesuffix(".npy") for name in archive.namelist()}
            for part, prefix in PREFIXES.items():
                if part != "train" and not {f"{prefix}_images", f"{prefix}_labels"} & there:
                    continue
                images, labels = (find_member(archive, f"{prefix}_{kind}") for kind in ("images", "labels"))
                self._check_images(f"{prefix}_images", images)
                for member in (images, labels):
                    fingerprint.update(f"{part} {member.info.CRC} {member.info.file_size} {member.shape}".encode())
                if images.shape[0]:
                    self._images[part], self.labels[part] = images, self._read_labels(archive, prefix, images, labels)
        if "test" not in self.labels and "validation" in self.labels:
            self._images["test"], self.labels["test"] = self._images.pop("validation"), self.labels.pop("validation")
        self.fingerprint = fingerprint.hexdigest()
        self.classes = self._find_classes()

    def name(self, part: str, row: int) -> str:
        """Which image of which array."""
        return f"{self._images[part].info.filename.removesuffix('.npy')}[{row}]"

    def pictures(self, part: str, start: int, size: int | None) -> Iterator[Picture | Exception]:
        """A part's pictures from row `start` on, resized and cropped to `size`."""
        member = self._images[part]
        shape, length = member.shape[1:], int(np.prod(member.shape[1:]))
        row, rest = 0, b""
        with open_npz(self.path) as archive:
            for chunk in read_chunks(archive, member):
                content = rest + chunk
                number = len(content) // length
                for index in range(max(start - row, 0), number):
                    pixels = np.frombuffer(content, np.uint8, length, index * length).reshape(shape)
                    yield to_picture(Image.fromarray(pixels).convert("RGB"), size)
                row, rest = row + number, content[number * length :]

    def _check_images(self, name: str, images: Member) -> None:
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)) or 0 in shape[1:]:
            raise DataFileError(
                f"{self.path}: '{name}' is {shape} {images.dtype}, expected (N, H, W) or (N, H, W, 3) uint8"
            )

    def _read_labels(self, archive: zipfile.ZipFile, prefix: str, images: Member, labels: Member) -> np.ndarray:
        number, whole = images.shape[0], labels.dtype.kind in "iub"
        if labels.shape not in ((number,), (number, 1)) or not whole:
            raise DataFileError(
                f"{self.path}: '{prefix}_labels' is {labels.shape} {labels.dtype}, expected one whole number for each "
                f"of {number} images"
            )
        values = read_array(archive, labels).reshape(-1)
        if values.min() < 0 or values.max() >= 2**31:
            raise DataFileError(f"{self.path}: '{prefix}_labels' are {values.min()} to {values.max()}")
        return values.astype(np.int64)

    def _find_classes(self) -> tuple[str, ...]:
        if "train" not in self.labels:
            raise DataFileError(f"{self.path}: holds no training images")
        there, number = set(np.unique(self.labels["train"]).tolist()), int(self.labels["train"].max()) + 1
        if number < 2:
            raise DataFileError(f"{self.path}: one class only, 0")
        if len(there) < number:
            lacking = [str(label) for label in range(min(number, 100_000)) if label not in there]
            raise DataFileError(f"{self.path}: classes without training images: {few(lacking)}")
        for part, labels in self.labels.items():
            if others := sorted({*np.unique(labels).tolist()} - there):
                raise DataFileError(f"{self.path}: classes of {part} that train has not: {few([*map(str, others)])}")
        return tuple(map(str, range(number)))
