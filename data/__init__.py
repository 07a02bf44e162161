"""Datasets by name: `load_data(name, data_dir)`. A new dataset is one load function and one entry in DATASETS.

A path in the place of a name is that of one's own images, a folder or an .npz file (data/own.py).
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data.cifar import load_cifar10, load_cifar100
from data.digits import load_digits
from data.files import DataFileError, Split, digest
from data.generated import Auxiliary, content_of, load_auxiliary
from data.loader import (
    Loader,
    balanced_subset,
    class_shares,
    first_examples,
    is_sorted,
    random_generator,
    rows_of,
    to_input,
)
from data.own import (
    CONTENT,
    HELD_OUT,
    Prepared,
    describe,
    find_own,
    has_test,
    has_validation,
    image_shape_of,
    num_classes_of,
    prepare_again,
    same_classes,
)
from data.tiny_imagenet import load_tiny_imagenet

__all__ = [
    "CONTENT",
    "DATASETS",
    "DEFAULT_DATA_DIR",
    "HELD_OUT",
    "Auxiliary",
    "DatasetInfo",
    "Loader",
    "Prepared",
    "Split",
    "balanced_subset",
    "content_of",
    "describe",
    "digest",
    "find_data_dir",
    "find_images",
    "first_examples",
    "has_test",
    "has_validation",
    "hold_out",
    "image_shape",
    "is_path",
    "is_sorted",
    "load_auxiliary",
    "load_data",
    "load_images",
    "num_classes",
    "rows_of",
    "same_classes",
    "to_input",
]

logger = logging.getLogger(__name__)

DEFAULT_DATA_DIR = Path(__file__).parent


class DatasetInfo(NamedTuple):
    """What there is to know of a dataset before it is loaded.

    mean, std: of the training pixels in [0,1], per channel. held_out: how much of the training set `hold_out` keeps
    for validation: so many images (the first, but class-balanced ones where the set is sorted by class), or (a float) a
    seeded random fraction. folder: where the prepared files
    train.npz and test.npz lie, below --data-dir; None where nothing is prepared.
    """

    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    held_out: int | float
    load: Callable[..., tuple[Split, Split]]
    folder: str | None = None


DATASETS = {
    "cifar10": DatasetInfo(10, 32, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 1024, load_cifar10, "cifar-10"),
    "cifar100": DatasetInfo(
        100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 1024, load_cifar100, "cifar-100"
    ),
    "tiny-imagenet": DatasetInfo(
        200, 64, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), 0.1, load_tiny_imagenet, "tiny-imagenet-200"
    ),
    "digits": DatasetInfo(10, 32, (0.3053, 0.3053, 0.3053), (0.3238, 0.3238, 0.3238), 200, load_digits),
}


def _info(name: str) -> DatasetInfo:
    if name not in DATASETS:
        raise ValueError(f"unknown dataset '{name}': must be one of {', '.join(DATASETS)}")
    return DATASETS[name]


def is_path(name: str) -> bool:
    """Whether a dataset's name is a path, that of one's own images."""
    return os.path.isabs(name)


def num_classes(name: str, content: str | None = None) -> int:
    """The number of classes of a dataset; of own images, `content` tells it."""
    return num_classes_of(content) if is_path(name) else _info(name).num_classes


def image_shape(name: str, content: str | None = None) -> tuple[int, int, int]:
    """(H, W, 3) of a dataset's images; of own images, `content` tells it."""
    return image_shape_of(content) if is_path(name) else (_info(name).image_size, _info(name).image_size, 3)


def find_images(
    path: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None, content: str | None = None
) -> Prepared:
    """The own images at `path`, prepared now where they are not yet: below `data_dir`, beside them for the default.

    image_size, content, errors: as for `data.own.find_own`.
    """
    below = None if data_dir is None or Path(data_dir) == DEFAULT_DATA_DIR else data_dir
    return find_own(path, below, image_size, content)


def load_images(
    path: str, data_dir: str | os.PathLike | None = None, image_size: int | None = None, content: str | None = None
) -> dict[str, Split]:
    """The own images at `path`: "train", and where there are such "validation" and "test"; as `find_images`.

    Large ones stay on disk, in `StoredImages`. Prepared files that are damaged are made again.
    """
    prepared = find_images(path, data_dir, image_size, content)
    try:
        return {part: prepared.split(part) for part in prepared.counts}
    except DataFileError as error:
        prepared = prepare_again(prepared, path, image_size, error)
        return {part: prepared.split(part) for part in prepared.counts}


def load_data(
    name: str, data_dir: str | os.PathLike = DEFAULT_DATA_DIR, *, download: bool = True
) -> tuple[Split, Split]:
    """Return (train, test) of dataset `name`: images (N,H,W,3) uint8, labels (N,) int64.

    Prepares the files below `data_dir` first where they are missing or damaged, by downloading if `download` allows.
    Raises ValueError (unknown name, unusable file) or OSError (no source answers, no permission) in one line.
    """
    return _info(name).load(data_dir, download=download)


def find_data_dir(name: str, stored: str | os.PathLike | None) -> Path:
    """Where dataset `name` lies for a run that had it below `stored`: there if its prepared files are there still.

    Else below the default folder if they are there, with a warning; else `stored` if there is such a folder at all. A
    folder that is gone is not made again.
    """
    stored = None if stored is None else Path(stored)

    if is_path(name):  # which need not be there any more
        return stored if stored is not None and os.path.isdir(stored) else DEFAULT_DATA_DIR

    def is_prepared(place: Path) -> bool:
        folder = _info(name).folder
        # Somebody else's folder may be closed to us: os.path says no where Path.is_file raises.
        return folder is None or all(os.path.isfile(place / folder / f"{part}.npz") for part in ("train", "test"))

    if stored is not None and os.path.isdir(stored) and (is_prepared(stored) or not is_prepared(DEFAULT_DATA_DIR)):
        return stored
    if stored is not None and _info(name).folder is not None:
        logger.warning("%s is no longer in %s; looking in %s (else: --data-dir)", name, stored, DEFAULT_DATA_DIR)
    return DEFAULT_DATA_DIR


def hold_out(
    split: Split, name: str, seed: int, *, by_class: bool = True, share: float | None = None
) -> tuple[Split, Split]:
    """Divide a training split of dataset `name` into (train, validation), as the paper does (see DatasetInfo).

    share: of own images, the seeded share that is held out of each class. `seed` matters where the held-out part is not
    the first one. by_class: whether a number of images of a set that is sorted by class is class-balanced; the first
    ones would be all that there is of a few classes. Raises ValueError if nothing would be left to train on.
    """
    if is_path(name):
        held = class_shares(split.labels, HELD_OUT if share is None else share, seed)
        if not held.any():
            raise ValueError(f"{name}: no class has two training images, one of which could be held out")
        return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])
    held_out, total = _info(name).held_out, len(split.labels)
    number = round(held_out * total) if isinstance(held_out, float) else held_out
    if not 0 < number < total:
        raise ValueError(f"{name}: cannot hold out {number} of {total} training images for validation")
    rows = torch.arange(total)
    if isinstance(held_out, float):
        rows = torch.from_numpy(random_generator(seed, "hold out").permutation(total))
    elif by_class and is_sorted(split):
        rows = balanced_subset(Split(rows, split.labels), number, seed).images
    held = torch.zeros(total, dtype=torch.bool).index_fill_(0, rows[:number], True)
    return Split(split.images[~held], split.labels[~held]), Split(split.images[held], split.labels[held])
