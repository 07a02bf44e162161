"""The classifiers, looked up by name: `create_model("wrn-28-10-swish")`; models of one's own are in models/own.py."""

import re
from collections.abc import Sequence
from functools import partial

from torch import nn

from models.normalization import CIFAR10_MEAN, CIFAR10_STD, replace_batch_norm
from models.own import is_own, make_own
from models.preact_resnet import DMPreActResNet, PreActResNet
from models.resnet import ResNet
from models.wide_resnet import WideResNet

MODELS = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    **{f"preact-resnet{depth}": partial(PreActResNet, depth) for depth in (18, 34, 50, 101)},
    **{f"preact-resnet{depth}-swish": partial(DMPreActResNet, depth) for depth in (18, 34)},
}
MODEL_NAMES = "wrn-D-W or wrn-D-W-swish with depth D = 10, 16, 22, 28, 34, ... (6k + 4) and width W >= 1, " + ", ".join(
    MODELS
)


def create_model(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalize: bool | None = None,
    group_norm: bool = False,
) -> nn.Module:
    """A new classifier: images (n, 3, h, w) with pixels in [0, 1] to logits (n, num_classes).

    Args:
        name: wrn-D-W or wrn-D-W-swish (depth D = 6k + 4, width W >= 1), preact-resnet{18,34,50,101},
            preact-resnet{18,34}-swish, resnet{18,34,50,101}; or what `models.own.use_own` gave, a model of one's own.
        num_classes: number of logits, at least 2.
        mean, std: of the dataset's three colour channels; CIFAR-10's where they are None. They are not in the state
            dict, and without effect where the model does not normalize.
        normalize: normalize the input by them, inside the model; where it is None, the -swish models do. A model of
            one's own normalizes by itself, or not at all.
        group_norm: GroupNorm(min(32, C), C) in the place of every BatchNorm2d(C) (see `replace_batch_norm`).

    Raises:
        ValueError: for an unknown name, a depth or width that no WideResNet has, fewer than two classes, a mean or std
            that is not three numbers (three positive ones for std), a model of one's own that was not used, is none or
            should be normalized, and for group_norm where there is no BatchNorm2d to replace.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes {num_classes}: expected at least 2")
    if name.endswith("-swish") if normalize is None else normalize:
        mean = CIFAR10_MEAN if mean is None else mean
        std = CIFAR10_STD if std is None else std
    else:
        mean = std = None
    if is_own(name):
        if mean is not None:
            raise ValueError(f"model {name}: a model of one's own normalizes its input by itself, or not at all")
        model = make_own(name, num_classes)
    else:
        model = _find(name)(num_classes=num_classes, mean=mean, std=std)
    if group_norm and not replace_batch_norm(model):
        raise ValueError(f"model {name}: it has no BatchNorm2d that GroupNorm could take the place of")
    return model


def _find(name: str) -> partial:
    if name in MODELS:
        return MODELS[name]
    # Three digits at most: a mistyped name should end in a message and not in a machine without memory.
    if match := re.fullmatch(r"wrn-([0-9]{1,3})-([0-9]{1,3})(-swish)?", name):
        depth, width, swish = int(match[1]), int(match[2]), match[3]
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"model {name!r}: accepted are {MODEL_NAMES}")
        return partial(WideResNet, depth, width, activation=nn.SiLU if swish else nn.ReLU)
    raise ValueError(f"unknown model {name!r}: accepted are {MODEL_NAMES}")
