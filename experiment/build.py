"""What the settings of a run stand for: stages, images, model, optimizer, the arguments of a loss.

For train.py, and for whatever measures a run as it was trained.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from data import (
    Split,
    balanced_subset,
    content_of,
    first_examples,
    hold_out,
    image_shape,
    is_path,
    load_auxiliary,
    load_data,
    load_images,
    num_classes,
)
from dyart.losses import SINGLE_STEP
from models import create_model
from models.own import check_model, is_own
from models.wide_resnet import WideResNet


class Stage(NamedTuple):
    """A part of a run with one loss, optimizer and schedule, after `epochs_before` epochs of other parts."""

    name: str
    method: str
    epochs_before: int
    epochs: int
    lr: float
    scheduler: str
    batch_size: int
    clip_grad: float | None

    @property
    def end(self) -> int:
        """The epochs of the run that are finished when this part is."""
        return self.epochs_before + self.epochs


def stages_of(settings: dict[str, Any]) -> list[Stage]:
    """The burn-in, where there is one, and the method."""
    s, before = settings, settings["burn_in_epochs"]
    burn_in = Stage("burn-in", "clean", 0, before, s["burn_in_lr"], "constant", s["burn_in_batch_size"], None)
    main = Stage(
        s["method"], s["method"], before, s["epochs"], s["lr"], s["scheduler"], s["batch_size"], s["clip_grad"]
    )
    return [burn_in, main] if before else [main]


class Data(NamedTuple):
    """The images of a run, and how a Loader mixes in its generated ones (nothing where it has none)."""

    train: Split
    validation: Split
    generated: dict[str, Any]


def generated_content(settings: Mapping[str, Any]) -> str | None:
    """What tells the generated data of a run wherever it lies; None where the run has none.

    Raises FileNotFoundError where there is no such file, and ValueError where it is damaged, or holds other images than
    those that the run began with.
    """
    path, known = settings["aux_data_filename"], settings["aux_data_content"]
    if path is None:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--aux-data-filename {path}: no such file; where it lies now can be said")
    content = content_of(path)
    if known not in (None, content):
        raise ValueError(f"--aux-data-filename {path}: its arrays ({content}) are not those of the run ({known})")
    return content


def load_parts(settings: Mapping[str, Any]) -> dict[str, Split]:
    """The "train", "validation" and "test" images of a run, all of them; own images may be without the last."""
    dataset, seed = settings["dataset"], settings["seed"]
    if not is_path(dataset):
        train, test = load_data(dataset, settings["data_dir"])
        parts, division = {"train": train, "test": test}, {"by_class": settings["rules"] >= 2}
    else:
        content = settings["dataset_content"]
        parts = load_images(dataset, settings["data_dir"], settings["image_size"], content)
        if settings["held_out"] is None and "validation" in parts:
            return parts
        division = {"share": settings["held_out"]}
    train, validation = hold_out(parts["train"], dataset, seed, **division)
    return {**parts, "train": train, "validation": validation}


def load_splits(settings: dict[str, Any], *, generated_too: bool = True) -> Data:
    """The images that the settings ask for. Raises ValueError where they ask for more than there are.

    generated_too: whether generated data is opened, which only training needs.
    """
    parts = load_parts(settings)
    train, validation = parts["train"], parts["validation"]
    epoch_size = len(train.labels) + len(validation.labels)
    subset = settings["train_subset"]
    if subset is not None:
        if subset > len(train.labels):
            raise ValueError(f"--train-subset {subset}: there are {len(train.labels)} training images")
        train, epoch_size = balanced_subset(train, subset, settings["seed"]), subset
    size = settings["validation_size"]
    if size is not None and size > len(validation.labels):
        raise ValueError(f"--validation-size {size}: only {len(validation.labels)} images are held out")
    generated = {}
    if settings["aux_data_filename"] is not None and generated_too:
        dataset = settings["dataset"], settings["dataset_content"]
        kind = {"image_shape": image_shape(*dataset), "num_classes": num_classes(*dataset)}
        kind |= {"cache_dir": settings["cache_dir"]}
        auxiliary = load_auxiliary(settings["aux_data_filename"], **kind)
        # The held-out images count for the length of an epoch, as in the paper.
        steps = math.ceil(epoch_size / settings["batch_size"])
        generated = {"auxiliary": auxiliary, "auxiliary_fraction": settings["unsup_fraction"], "steps_per_epoch": steps}
    return Data(train, validation if size is None else sample(validation, size, settings), generated)


def sample(split: Split, n: int, settings: dict[str, Any]) -> Split:
    """At most n examples to judge a run by: the first ones, class-balanced ones where the split is sorted by class.

    (By rules 1 the first ones in any case, of a few classes only.)
    """
    if settings["rules"] < 2 or n >= len(split.labels):
        return Split(split.images[:n], split.labels[:n])
    return first_examples(split, n, settings["seed"])


def build_model(settings: dict[str, Any]) -> nn.Module:
    """The untrained model that the settings name, on the CPU. Raises ValueError where it does not fit the images."""
    dataset = settings["dataset"], settings.get("dataset_content")
    kind = {name: settings[name] for name in ("mean", "std", "normalize", "group_norm")}
    model = create_model(settings["model"], num_classes(*dataset), **kind)
    model = model.to(memory_format=torch.channels_last) if settings["channels_last"] else model
    if is_own(settings["model"]):
        size, channels_last = image_shape(*dataset)[:2], settings["channels_last"]
        check_model(model, settings["model"], num_classes(*dataset), size, channels_last=channels_last)
    elif is_path(settings["dataset"]):
        check_size(settings["model"], image_shape(*dataset))
    return model


def check_size(name: str, shape: tuple[int, int, int]) -> None:
    """Raise ValueError where the model of this name does not take images of this shape (H, W, 3); computes nothing."""
    height, width, channels = shape
    with torch.device("meta"):
        model = create_model(name).eval()
        try:
            model(torch.empty(1, channels, height, width))
        except RuntimeError:
            raise ValueError(
                f"--model {name} does not take images of {width}x{height} (width x height): its layers halve them, "
                "so their sides have to be multiples of 4 or 8; --image-size N makes them so"
            ) from None


def share_statistics(model: nn.Module, settings: dict[str, Any], device: torch.device, processes: int) -> nn.Module:
    """The model as several processes train it, with --sync-batch-norm. Raises ValueError where that cannot be."""
    if not settings["sync_batch_norm"]:
        return model
    if device.type != "cuda":
        raise ValueError(f"--sync-batch-norm: only on GPUs, not with --device {settings['device']}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if processes > 1 else model


def step_seed(settings: dict[str, Any], *position: int) -> int:
    """A seed for the random starts of one step (or one validation), the same wherever the run was resumed."""
    return int(np.random.SeedSequence([settings["seed"], *position]).generate_state(1)[0])


def build_optimizer(model: nn.Module, stage: Stage, settings: dict[str, Any]) -> SGD:
    """SGD; a WideResNet's normalization layers have no weight decay, as in Gowal et al., 2020."""
    norms = (_BatchNorm, nn.GroupNorm) if isinstance(model, WideResNet) else ()
    plain = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in plain], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if id(p) in plain], "weight_decay": 0.0},
    ]
    nesterov = settings["nesterov"] and settings["momentum"] > 0
    return SGD([g for g in groups if g["params"]], lr=stage.lr, momentum=settings["momentum"], nesterov=nesterov)


def loss_options(settings: dict[str, Any], method: str) -> dict[str, Any]:
    """The keyword arguments that a method's loss function takes from the settings."""
    s = settings
    if method == "dyart":
        names = ("lambda_robust", "alpha", "r0", "overshoot", "temperature")
        names += ("norm", "search", "adaptive_steps", "init_radius", "high_quality")
        return {name: s[name] for name in names} | {"steps": s["search_steps"]}
    options = {"norm": s["norm"], "eps": s["attack_eps"]}
    if method in SINGLE_STEP:
        return options
    options |= {"step_size": s["attack_step"], "steps": s["attack_iter"]}
    return {"clean": {}, "at": options}.get(method, options | {"beta": s["beta"]})
