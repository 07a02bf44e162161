"""What lies in a folder of images: its parts, classes and files, in torchvision's ImageFolder layout.

    PATH/train/CLASS/**/*.jpg     and test/, val/ likewise; or PATH/CLASS/**/*.jpg, which is all for training

Nothing is read but names, sizes and times. What cannot be meant is refused in one line with the first few names.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from data.files import DataFileError
from data.pictures import SUFFIXES, UNREAD_SUFFIXES, Picture, read_picture, without_warnings
from storage.files import few, naming

# Where people keep each part. Without test/, val/ is what is tested on, as Tiny-ImageNet and ImageNet have it.
PARTS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}
# What systems and programs leave beside pictures; what begins with a dot is hidden.
LITTER = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information"}


THREADS = 16  # that decode pictures

_File: TypeAlias = tuple[str, str, int, int]  # folder, name, bytes, time


class _Found:
    """What a walk meets: files by their folders, and what is to be told of."""

    def __init__(self, bar: tqdm):
        self.bar = bar
        self.files: list[_File] = []
        self.lost: list[str] = []  # links that lead nowhere, or back to where they lie
        self.unread: list[str] = []
        self.passed_over: list[str] = []
        self.special: list[str] = []


class ImageFolder:
    """A folder of images: classes in their order, and of each part (train, validation, test) files and labels (N,).

    Links are followed, hidden files are not seen, other files are passed over with a note. Files are in the order of
    torchvision's ImageFolder, and classes, as there, in that of their names. fingerprint: of all names, sizes and
    times, which tells an unchanged folder. Raises DataFileError for a folder that cannot be trained on, and FileError.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.notes: list[str] = []
        self.classes, by_part = _list(self.path, self.notes)
        fingerprint = hashlib.sha256(b"image folder 1")
        self.files: dict[str, list[str]] = {}
        self.labels: dict[str, np.ndarray] = {}
        for part, files_of in by_part.items():
            counts = [len(files_of.get(name, [])) for name in self.classes]
            self.labels[part] = np.repeat(np.arange(len(counts)), counts)
            self.files[part] = []
            for label, name in enumerate(self.classes):
                fingerprint.update(f"\0{part} {label} {counts[label]}\0".encode() + os.fsencode(name))
                for folder, file, size, time in sorted(files_of.get(name, [])):
                    self.files[part].append(os.path.join(folder, file))
                    fingerprint.update(os.fsencode(f"\0{folder}/{file}") + f"\0{size} {time}".encode())
        self.fingerprint = fingerprint.hexdigest()

    def name(self, part: str, row: int) -> str:
        """A file's name, from the folder on."""
        return self.files[part][row]

    def pictures(self, part: str, start: int, size: int | None) -> Iterator[Picture | Exception]:
        """A part's pictures from row `start` on, resized and cropped to `size`, or what is wrong with each."""

        def read(name: str) -> Picture | Exception:
            try:
                return read_picture(self.path / name, size)
            except (ValueError, OSError) as error:
                return error

        files, threads = self.files[part], min(os.cpu_count() or 1, THREADS)
        with without_warnings(), ThreadPoolExecutor(threads) as pool:
            for first in range(start, len(files), 8 * threads):  # a few at a time: photographs are large
                yield from pool.map(read, files[first : first + 8 * threads])


def _list(path: Path, notes: list[str]) -> tuple[tuple[str, ...], dict[str, dict[str, list[_File]]]]:
    """The classes, and the files of each class of each part; what is to be told of them goes to `notes`."""
    with naming("read", path), tqdm(desc=f"looking into {path.name}", unit=" files", delay=2, leave=False) as bar:
        found = _Found(bar)
        parts = _parts_of(path)
        by_part = {part: _classes_in(folder, path, found) for part, folder in parts.items()}
    by_part = {part: files for part, files in by_part.items() if part == "train" or any(files.values())}
    _refuse(path, found.lost, "links that lead nowhere or in a circle", "mend or remove them")
    _refuse(path, found.special, "pipes, sockets or devices", "remove them")
    _refuse(path, found.unread, "pictures in formats that cannot be read", "convert them to JPEG or PNG")
    if found.passed_over:
        notes.append(f"passed over, since not pictures in a class's folder: {few(sorted(found.passed_over))}")
    classes = tuple(sorted(by_part["train"]))
    _check_classes(path, classes, by_part, notes)
    return classes, by_part


def _parts_of(path: Path) -> dict[str, str]:
    """The folder of each part, named from `path` on: "" where all of it is for training."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    there = {}
    for part, names in PARTS.items():
        meant = [name for name in folders if name.lower() in names]
        if len(meant) > 1:
            raise DataFileError(f"{path}: {' and '.join(meant)} are both the {part} images: rename one")
        if meant:
            there[part] = meant[0]
    if "train" not in there:
        if there:
            others = " and ".join(f"{name}/" for name in there.values())
            raise DataFileError(f"{path}: there is {others} but no train/ with the images to train on")
        return {"train": ""}
    tested, judged = there.get("test"), there.get("val")
    if tested is None:
        tested, judged = judged, None
    parts = {"train": there["train"], "validation": judged, "test": tested}
    return {part: folder for part, folder in parts.items() if folder is not None}


def _classes_in(part: str, path: Path, found: _Found) -> dict[str, list[_File]]:
    """The files of each class of a part."""
    above = {_identity(os.stat(path / part))}
    classes = {}
    with os.scandir(path / part) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = os.path.join(part, entry.name)
            if _is_hidden(entry.name):
                continue
            if not entry.is_dir():
                (found.lost if entry.is_symlink() and not os.path.exists(entry) else found.passed_over).append(name)
                continue
            before = len(found.files)
            _walk(path, name, above, found)
            classes[entry.name], found.files[before:] = found.files[before:], []
    return classes


def _walk(path: Path, folder: str, above: set[tuple[int, int]], found: _Found) -> None:
    """Add what lies below a folder to `found`; `above` are the folders that it lies in, to tell a circle."""
    status = _identity(os.stat(path / folder))
    if status in above:
        found.lost.append(folder)
        return
    with os.scandir(path / folder) as entries:
        for entry in entries:
            name, suffix = os.path.join(folder, entry.name), os.path.splitext(entry.name)[1].lower()
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                _walk(path, name, above | {status}, found)
            elif entry.is_symlink() and not os.path.exists(entry):
                found.lost.append(name)
            elif suffix in UNREAD_SUFFIXES:
                found.unread.append(name)
            elif suffix not in SUFFIXES:
                found.passed_over.append(name)
            else:
                file = entry.stat()
                if not stat.S_ISREG(file.st_mode):
                    found.special.append(name)
                found.files.append((folder, entry.name, file.st_size, file.st_mtime_ns))
                found.bar.update()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _refuse(path: Path, names: Iterable[str], what: str, remedy: str) -> None:
    if names := sorted(names):
        raise DataFileError(f"{path}: {what}: {few(names)}; {remedy}")


def _check_classes(
    path: Path, classes: Sequence[str], by_part: dict[str, dict[str, list[_File]]], notes: list[str]
) -> None:
    """Raise DataFileError for classes that cannot be trained on, or that differ between the parts."""
    layout = f"expected {path}/train/CLASS/*.jpg and {path}/test/CLASS/*.jpg, or {path}/CLASS/*.jpg"
    if not any(by_part["train"].values()):
        raise DataFileError(f"{path}: no images in folders of classes; {layout}")
    if len(classes) < 2:
        raise DataFileError(f"{path}: one class only, {classes[0]}; {layout}")
    for part, files_of in by_part.items():
        same = {}
        for name in files_of:
            same.setdefault(name.casefold(), []).append(name)
        doubled = [" and ".join(names) for names in same.values() if len(names) > 1]
        _refuse(path, doubled, "classes whose names differ in case only", "rename or merge them")
        if part == "train":
            _refuse(path, [n for n, files in files_of.items() if not files], "classes without images", "remove them")
        others = [name for name, files in files_of.items() if files and name not in classes]
        if others:
            alike = {name.casefold(): name for name in classes}
            others = [f"{n} (in train: {alike[n.casefold()]})" if n.casefold() in alike else n for n in others]
            raise DataFileError(f"{path}: classes of {part} that train has not: {few(sorted(others))}")
        lacking = [name for name in classes if not files_of.get(name)]
        if lacking:
            notes.append(f"no {part} images of {few(lacking)}")
