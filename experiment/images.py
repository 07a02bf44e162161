"""A run's images in its settings: a dataset's name, or one's own images and what there is to know of them.

For train.py's settings and for whoever is given a model's flags. The images themselves are found by data/own.py.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

from data import CONTENT, DATASETS, HELD_OUT, Prepared, find_images, has_validation, is_path
from experiment import flags

# The settings of own images. Beside the name of a dataset they are None.
OWN = ("image_size", "held_out", "dataset_content")


def dataset_name(text: str) -> str:
    """A dataset's name, or the absolute path of one's own images, whether they are there or not.

    The released code's `cifar10s` is cifar10 that may take generated data.
    """
    name = {"cifar10s": "cifar10", "cifar100s": "cifar100"}.get(text, text)
    if name in DATASETS:
        return name
    if os.sep in text or text.endswith(".npz") or os.path.isdir(text):
        return flags.path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DATASETS)}, nor a folder or .npz file")


def images_content(text: str) -> str:
    """What tells own images (`data.own.Prepared`), as settings keep it."""
    if not CONTENT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} does not tell images")
    return text


def add_dataset_flags(group: Any, default: str | None = None) -> None:
    """The flags that say which images, of all scripts. default: the dataset, for train.py."""
    shown = "" if default else " (cifar10)"
    own = "; or your own images, a FOLDER (train/CLASS/*, test/CLASS/*) or FILE.npz"
    names = ", ".join(DATASETS) + shown + own
    group.add_argument("--dataset", "--data", type=dataset_name, default=default, help=names)
    size = "own images: shorter side resized to N, centre-cropped (their own size, where all have one)"
    group.add_argument("--image-size", metavar="N", type=flags.whole(least=8), default=None, help=size)


def add_own_flags(group: Any) -> None:
    """The flags of own images that are only for training."""
    held_out = f"share of own images to validate on ({HELD_OUT}, or what is in val/ beside test/)"
    group.add_argument("--held-out", type=flags.number(above=0, most=0.9), default=None, help=held_out)
    # Which images they are, wherever they lie; filled in by `resolve_images`.
    group.add_argument("--dataset-content", type=images_content, default=None, help=argparse.SUPPRESS)


def resolve_images(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be known of own images, which are prepared for it where it is not given; nothing of other datasets.

    values: `dataset`, and where they are given `data_dir` and `OWN`. Raises ValueError or OSError for images that
    cannot be used, and for flags of own images beside the name of a dataset.
    """
    given = {name: values[name] for name in OWN if values.get(name) is not None}
    if not is_path(values["dataset"]):
        for name, value in given.items():
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: is for own images; {values['dataset']} has its own")
        return {}
    content = given.get("dataset_content") or find_own_images(values).content
    usual = None if has_validation(content) else HELD_OUT
    return {"dataset_content": content, "held_out": given.get("held_out", usual)}


def find_own_images(values: Mapping[str, Any]) -> Prepared:
    """The own images that settings name, prepared now where they are not yet."""
    return find_images(values["dataset"], *(values.get(name) for name in ("data_dir", "image_size", "dataset_content")))


def mean_and_std(values: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and standard deviation of a dataset's training pixels in [0, 1], for each colour channel."""
    info = find_own_images(values) if is_path(values["dataset"]) else DATASETS[values["dataset"]]
    return {"mean": list(info.mean), "std": list(info.std)}
