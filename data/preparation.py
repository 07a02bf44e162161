"""Pictures written once as arrays: block by block, so that it can be cut anywhere, and read back before they count."""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data.files import CHUNK, DataFileError, digest_of
from data.pictures import Picture
from storage.files import FileError, few, read_json, replacing, write_json

PARTS = ("train", "validation", "test")


class Source(Protocol):
    """What is prepared: a folder of images, or a file of them.

    labels: of each part that there is. fingerprint: tells an unchanged source, without its images being read. notes:
    what is to be said of it when it is prepared.
    """

    path: Path
    classes: Sequence[str]
    labels: Mapping[str, np.ndarray]
    fingerprint: str
    notes: list[str]

    def name(self, part: str, row: int) -> str:
        """What messages call a picture."""
        ...

    def pictures(self, part: str, start: int, size: int | None) -> Iterator[Picture | Exception]:
        """A part's pictures from row `start` on, resized and cropped to `size`, or what is wrong with each."""
        ...


class _Writer:
    """The images of one part as they are written, and how far that has come: on the disk after every block."""

    def __init__(self, folder: Path, part: str, total: int):
        self.path, self.total = folder / f"{part}.npy", total
        self.progress_path = folder / f"{part}.progress.json"
        self.state: dict[str, Any] = {"shape": None, "rows": [], "crc": [], "sizes": None}
        if self.progress_path.exists() and self.path.exists():
            self.state = read_json(self.progress_path)
        self.block: list[np.ndarray] = []

    @property
    def rows(self) -> int:
        """How many images are on the disk."""
        return sum(self.state["rows"])

    def add(self, picture: Picture) -> None:
        """Write the next image, or keep it until there is enough for a block."""
        pixels, own = picture
        least, most = self.state["sizes"] or (own, own)
        area = np.prod
        self.state["sizes"] = [list(min(least, own, key=area)), list(max(most, own, key=area))]
        self.state["shape"] = list(pixels.shape)
        self.block.append(pixels)
        if len(self.block) * pixels.nbytes >= CHUNK or self.rows + len(self.block) == self.total:
            self._write(np.stack(self.block).tobytes())

    def _write(self, content: bytes) -> None:
        done = self.rows
        with open(self.path, "r+b" if done else "wb") as file:
            if not done:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.total, *self.state["shape"])}
                np.lib.format.write_array_header_1_0(file, header)
                self.state["offset"] = file.tell()
            # What was written after the last block that counts is written again.
            file.seek(self.state["offset"] + done * int(np.prod(self.state["shape"])))
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.state["rows"].append(len(self.block))
        self.state["crc"].append(zlib.crc32(content))
        self.block = []
        write_json(self.progress_path, self.state)

    def blocks(self) -> Iterator[np.ndarray]:
        """What was written, read back. Raises DataFileError where it is not the same."""
        with open(self.path, "rb") as file:
            file.seek(self.state["offset"])
            for rows, crc in zip(self.state["rows"], self.state["crc"], strict=True):
                content = file.read(rows * int(np.prod(self.state["shape"])))
                if zlib.crc32(content) != crc:
                    raise DataFileError(f"{self.path}: not as it was written; is the disk sound? Try again")
                yield np.frombuffer(content, np.uint8).reshape(rows, *self.state["shape"])


def prepare(source: Source, partial: Path, size: int | None) -> dict[str, Any]:
    """Write the images of a source into the folder `partial`, or what of them is not there yet.

    Returns what there is to tell of them: classes, counts, mean, std, sizes, shape, digests. Raises DataFileError for
    pictures that cannot be used, with the first few names, and OSError.
    """
    partial.mkdir(exist_ok=True)
    parts = [part for part in PARTS if part in source.labels]
    total = sum(len(source.labels[part]) for part in parts)
    try:
        writers = {part: _Writer(partial, part, len(source.labels[part])) for part in parts}
        with tqdm(total=total, desc=f"preparing {source.path.name}", unit=" images") as bar:
            _write_all(source, writers, size, bar)
        with tqdm(total=total, desc=f"checking {source.path.name}", unit=" images", leave=False) as bar:
            digests, counted = _read_back(source, writers, bar)
    except (KeyError, TypeError) as error:
        raise FileError(f"{partial}: damaged ({error}); try again") from error
    sizes = [writer.state["sizes"] for writer in writers.values()]
    for part, writer in writers.items():
        with replacing(partial / f"{part}-labels.npy") as file:
            np.save(file, source.labels[part])
        writer.progress_path.unlink()
    values = np.arange(256) / 255
    pixels = counted.sum(1)
    mean = counted @ values / pixels
    std = np.sqrt(np.maximum(counted @ values**2 / pixels - mean**2, 0))
    return {
        "classes": list(source.classes),
        "shape": list(writers["train"].state["shape"]),
        "counts": {p: np.bincount(source.labels[p], minlength=len(source.classes)).tolist() for p in parts},
        "mean": [round(float(value), 4) for value in mean],
        # To be divided by, also where all pixels are alike.
        "std": [max(round(float(value), 4), 0.0001) for value in std],
        "sizes": [min((least for least, _ in sizes), key=np.prod), max((most for _, most in sizes), key=np.prod)],
        "digests": digests,
    }


def _write_all(source: Source, writers: Mapping[str, _Writer], size: int | None, bar: tqdm) -> None:
    """Write the pictures that are missing. Looks at all before it says which cannot be used."""
    problems = []
    shape = None
    for part, writer in writers.items():
        shape = shape or writer.state["shape"]
        bar.update(writer.rows)
        for row, picture in enumerate(source.pictures(part, writer.rows, size), start=writer.rows):
            bar.update()
            if isinstance(picture, Exception):
                reason = picture.strerror if isinstance(picture, OSError) and picture.strerror else picture
                problems.append(f"{source.name(part, row)} ({reason})")
                continue
            pixels = picture.pixels
            shape = shape or list(pixels.shape)
            if list(pixels.shape) != shape:
                raise DataFileError(
                    f"{source.path}: images of different sizes: {source.name(part, row)} is "
                    f"{pixels.shape[1]}x{pixels.shape[0]}, others are {shape[1]}x{shape[0]}; "
                    "--image-size N brings all to N x N"
                )
            if not problems:
                writer.add(picture)
    if problems:
        count = f"{len(problems)} of {bar.total} images cannot be read"
        raise DataFileError(f"{source.path}: {count}: {few(problems)}; mend or remove them")


def _read_back(source: Source, writers: Mapping[str, _Writer], bar: tqdm) -> tuple[dict[str, str], np.ndarray]:
    """The digest of each part, and how often each value (of 256) is there in the training images, (3, 256)."""
    digests, counted = {}, np.zeros((3, 256), np.int64)
    for part, writer in writers.items():

        def blocks(part: str = part, writer: _Writer = writer) -> Iterator[np.ndarray]:
            for block in writer.blocks():
                if part == "train":
                    counted[:] += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(3)]
                bar.update(len(block))
                yield block

        digests[part] = digest_of(blocks(), (writer.total, *writer.state["shape"]), source.labels[part])
    return digests, counted
