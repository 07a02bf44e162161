"""Images of one's own: a folder or an .npz file, prepared once into files of uint8 that are read as they are.

    PATH.prepared/KEY/     beside PATH, or below --data-dir where that is given
      train.npy, ...         images (N,H,W,3) uint8; np.load(..., mmap_mode="r") maps them
      train-labels.npy, ...  labels (N,) int64
      about.json             classes, counts, mean, std, sizes, and what tells the images

What was prepared is known by its content: of a folder that has changed, images are prepared again, beside those from
before, with which the runs that began with them go on. A preparation that is cut goes on where it was.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.files import DataFileError, Split, digest, preparing, read_npy_header
from data.generated import Auxiliary
from data.image_folder import ImageFolder
from data.image_npz import ImageArchive
from data.preparation import PARTS, Source, prepare
from data.stored import StoredImages
from storage.files import FileError, naming, one_line, open_regular, read_json, sync_folder, write_json

logger = logging.getLogger(__name__)

# Larger sets are read a batch at a time.
IN_MEMORY = 2 << 30  # bytes
HELD_OUT = 0.1  # share of the training images, where a set has no validation images of its own
CONTENT = re.compile(r"([0-9]+)x([0-9]+)x([0-9]+)-[0-9a-f]{12}(?:/(?:[0-9a-f]{16}|-)){3}")
KNOWN_SOURCES = 20  # how many states of a folder are remembered that gave the same images

# What this process has found where (path, size, content): to look again for changes takes seconds a million files.
_FOUND: set[tuple[Path, int | None, str]] = set()


class Prepared(NamedTuple):
    """Own images as they are prepared in `folder`; what `about.json` says of them.

    content: what tells the images wherever they lie, "CLASSESxHEIGHTxWIDTH-NAMES/TRAIN/VALIDATION/TEST" with a digest
    of the classes' names and of each part ("-" where there is none). counts: of each part, the images of each class.
    mean, std: of the training pixels in [0,1], per channel. sizes: of the smallest and the largest picture, (h, w).
    """

    folder: Path
    content: str
    classes: tuple[str, ...]
    counts: dict[str, list[int]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sizes: list[list[int]]
    digests: dict[str, str]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return image_shape_of(self.content)

    def split(self, part: str) -> Split:
        """The images of a part, none where there is no such part. Raises DataFileError where a file is damaged."""
        if part not in self.counts:
            return Split(torch.empty((0, *self.image_shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
        path, total = self.folder / f"{part}.npy", sum(self.counts[part])
        labels, _ = _map(self.folder / f"{part}-labels.npy", (total,), np.dtype("<i8"))
        images, offset = _map(path, (total, *self.image_shape), np.dtype("u1"))
        if labels.min() < 0 or np.bincount(labels, minlength=len(self.classes)).tolist() != self.counts[part]:
            raise DataFileError(f"{self.folder}: the labels of {part} are not those that were prepared")
        if images.nbytes > IN_MEMORY:
            stored = StoredImages(Auxiliary(path, offset, self.image_shape, labels.copy()))
            return Split(stored, torch.from_numpy(labels.copy()))
        split = Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()))
        if digest(split) != self.digests[part]:
            raise DataFileError(f"{path}: damaged: its SHA-256 is wrong")
        return split


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, int]:
    """A memory map of an array that has to have this shape and type, and where in the file it begins."""
    try:
        with open_regular(path) as file:
            found, kind, offset = read_npy_header(file, str(path))
        length = os.path.getsize(path)
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: damaged or missing ({one_line(error)})") from error
    expected = offset + int(np.prod(shape)) * dtype.itemsize
    if (found, kind) != (shape, dtype) or length != expected:
        raise DataFileError(f"{path}: {length} bytes of {found} {kind}, expected {expected} of {shape} {dtype}")
    return np.memmap(path, dtype, "r", offset, shape), offset


# --- What tells own images --------------------------------------------------------------------------------------------


def num_classes_of(content: str) -> int:
    """The number of classes of own images."""
    return int(content.partition("x")[0])


def image_shape_of(content: str) -> tuple[int, int, int]:
    """(H, W, 3) of own images."""
    height, width = CONTENT.fullmatch(content).group(2, 3)
    return int(height), int(width), 3


def has_test(content: str) -> bool:
    """Whether there are test images among own ones."""
    return not content.endswith("/-")


def has_validation(content: str) -> bool:
    """Whether there are validation images of their own among own ones."""
    return content.split("/")[2] != "-"


def same_classes(one: str, other: str) -> bool:
    """Whether two contents have the same classes by the same labels."""

    def classes(content: str) -> tuple[int, str]:
        return num_classes_of(content), content.partition("/")[0].rpartition("-")[2]

    return classes(one) == classes(other)


def describe(prepared: Prepared) -> str:
    """What a set of own images is, for people: a line on the whole, and one on each class."""
    parts = ", ".join(f"{sum(counts)} {part}" for part, counts in prepared.counts.items())
    height, width, _ = prepared.image_shape
    smallest, largest = ("x".join(map(str, reversed(size))) for size in prepared.sizes)
    lines = [f"{parts} images of {len(prepared.classes)} classes, {width}x{height} (width x height)"]
    lines += [f"pictures from {smallest} to {largest}; prepared in {prepared.folder}"]
    lines += [f"mean {', '.join(map(str, prepared.mean))}; std {', '.join(map(str, prepared.std))}"]
    for label, name in enumerate(prepared.classes):
        lines += [f"class {label} {name}: " + ", ".join(f"{c[label]} {part}" for part, c in prepared.counts.items())]
    return "\n".join(lines)


# --- Where they are prepared, or are prepared now ---------------------------------------------------------------------


def find_own(
    path: str | os.PathLike, below: str | os.PathLike | None, size: int | None, content: str | None = None
) -> Prepared:
    """The prepared images of a folder or an .npz file; where there are none yet they are prepared.

    below: the folder in which they are prepared, None for that of `path`; they are found in both. size: the shorter
    side is resized to it, and the centre cut out; None keeps the images' own size. content: which images they have to
    be, those of a run; then `path` itself may have changed, or be gone, which is warned of, once in a process.

    Raises FileNotFoundError, DataFileError for a source that cannot be used or holds other images, OSError.
    """
    path = Path(path)
    folders = [path.parent] if below is None else [Path(below), path.parent]
    places = [folder / f"{path.name}.prepared" for folder in folders]
    for place in places if content is not None else ():
        known = read_about(place / _name_of(content))
        if known is not None and known.content == content:
            if (path, size, content) not in _FOUND and not _is_made_from(known, path, size):
                logger.warning("%s has changed, or is gone: its images of before are taken, %s", path, known.folder)
            _FOUND.add((path, size, content))
            return known
    source = _open_source(path)
    found = (_known(place, source.fingerprint, size) for place in places)
    prepared = next((known for known in found if known is not None), None) or _prepare(source, places[0], size)
    if content not in (None, prepared.content):
        raise DataFileError(
            f"--dataset {path}: its images ({prepared.content}) are not those of the run ({content}), "
            f"which are not in {places[0]} either"
        )
    _FOUND.add((path, size, prepared.content))
    return prepared


def prepare_again(prepared: Prepared, path: str | os.PathLike, size: int | None, reason: object) -> Prepared:
    """Own images whose prepared files turned out to be damaged, prepared again. Raises as `find_own`."""
    if not os.path.exists(path):
        raise DataFileError(f"{reason}; {path}, which it was prepared from, is gone") from None
    logger.warning("%s; preparing it again", reason)
    with preparing(prepared.folder.parent):
        shutil.rmtree(prepared.folder)
    again = _prepare(_open_source(Path(path)), prepared.folder.parent, size)
    if again.content != prepared.content:
        raise DataFileError(f"{reason}; {path}, which it was prepared from, holds other images now")
    return again


def read_about(folder: Path) -> Prepared | None:
    """What a folder of prepared images says it holds; None where it is no such folder, or what it says cannot be."""
    try:
        about = read_json(folder / "about.json")
        sizes, counts = about["sizes"], about["counts"]
        prepared = Prepared(
            folder=folder,
            content=about["content"],
            classes=tuple(about["classes"]),
            counts=counts,
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            sizes=sizes,
            digests=about["digests"],
        )
        sound = CONTENT.fullmatch(prepared.content) and folder.name == _name_of(prepared.content)
        sound = sound and prepared.content == _content_of(prepared.image_shape, prepared.classes, prepared.digests)
        sound = sound and counts.keys() == prepared.digests.keys() and "train" in counts and counts.keys() <= {*PARTS}
        sound = sound and all(len(c) == len(prepared.classes) and min(c) >= 0 and sum(c) > 0 for c in counts.values())
        numbers = [*prepared.mean, *prepared.std]
        sound = sound and len(numbers) == 6 and all(type(n) is float and 0 <= n <= 1 for n in numbers)
        sound = sound and [[type(n) for n in size] for size in sizes] == [[int, int]] * 2
    except (FileError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return prepared if sound else None


def _prepare(source: Source, place: Path, size: int | None) -> Prepared:
    path = source.path
    with preparing(place):
        if (known := _known(place, source.fingerprint, size)) is not None:  # made while this process waited
            return known
        partial = place / f"{_source_name(source.fingerprint, size)}.partial"
        for other in place.glob("*.partial"):  # of a folder as it was before
            if other != partial:
                shutil.rmtree(other, ignore_errors=True)
        for note in [*source.notes, f"preparing its images, once, in {place}"]:
            logger.warning("%s: %s", path, note)
        try:
            with naming("prepare images (elsewhere: --data-dir) in", place):
                about = prepare(source, partial, size)
                return _finish(partial, place, about | {"made_from": [_source_name(source.fingerprint, size)]})
        except ValueError as error:
            # Of what cannot be used nothing is left; where the disk is full, it goes on when there is room.
            if not isinstance(error.__cause__, OSError):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _finish(partial: Path, place: Path, about: dict[str, Any]) -> Prepared:
    """Give prepared images their place, at once; those that are there already under another name or time, theirs."""
    content = _content_of(about.pop("shape"), about["classes"], about["digests"])
    final = place / _name_of(content)
    known = read_about(final)
    if known is not None:
        _add_source(final, about["made_from"])
        shutil.rmtree(partial)
        return known
    write_json(partial / "about.json", {"content": content, **about})
    sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)  # damaged
    os.rename(partial, final)
    sync_folder(place)
    return read_about(final)


def _add_source(folder: Path, names: list[str]) -> None:
    about = read_json(folder / "about.json")
    about["made_from"] = [*names, *_sources_of(folder)][:KNOWN_SOURCES]
    write_json(folder / "about.json", about)


def _content_of(shape: Sequence[int], classes: Sequence[str], digests: Mapping[str, str]) -> str:
    height, width, _ = shape
    names = hashlib.sha256("\0".join(classes).encode(errors="surrogateescape")).hexdigest()[:12]
    parts = [digests[part][:16] if part in digests else "-" for part in PARTS]
    return "/".join([f"{len(classes)}x{height}x{width}-{names}", *parts])


def _open_source(path: Path) -> Source:
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix != ".npz" or not path.exists():
        raise FileNotFoundError(f"--dataset {path}: no such folder, or .npz file; where it lies now can be said")
    return ImageArchive(path)


def _known(place: Path, fingerprint: str, size: int | None) -> Prepared | None:
    for folder in sorted(place.glob("*/")) if place.is_dir() else ():
        if (about := read_about(folder)) is not None and _source_name(fingerprint, size) in _sources_of(folder):
            return about
    return None


def _is_made_from(prepared: Prepared, path: Path, size: int | None) -> bool:
    try:
        return _source_name(_open_source(path).fingerprint, size) in _sources_of(prepared.folder)
    except (OSError, ValueError):
        return False


def _sources_of(folder: Path) -> list[str]:
    sources = read_json(folder / "about.json").get("made_from")
    return sources if isinstance(sources, list) else []


def _source_name(fingerprint: str, size: int | None) -> str:
    return f"{fingerprint[:16]}-{size or 'own'}"


def _name_of(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]
