"""Loading weights into a model: our own, or those that others saved from inside a wrapper."""

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.normalization import Normalization

COUNTER = "num_batches_tracked"
# The statistics that a model normalizes its input by, under any prefix.
STATISTICS = ("mean", "std")


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load `state_dict` strictly into a model that `create_model` made, or raise and leave the model as it was.

    What all names begin with, whatever it is (`module.`, `model.net.`), is taken off, or put in front where it is the
    model's names that have it; `_orig_mod.` is taken off wherever it stands, and the counter `n_averaged` of an
    AveragedModel is left out. Entries called `mean` and `std` that the model has not are held against those that it
    normalizes by (`statistics_of` has them, to build the model by). Any precision is taken. The counters
    `num_batches_tracked`, which have no effect on the output, may be missing, or floats. A ReLU and a Swish WideResNet
    have the same entries: one's weights load into the other unnoticed.

    Args:
        source: where the weights come from (a file, mostly), for the messages.

    Raises:
        ValueError: in one line, for what is no state dict, weights of another model or number of classes, weights that
            expect another normalization of the input than the model's, and values that are NaN or infinite.
    """
    _check_state_dict(state_dict, source)
    own = model.state_dict()
    theirs = {name: value for name, value in state_dict.items() if name != "n_averaged" or name in own}
    statistics: dict[str, Tensor] = {}
    weights, beyond = _renamed(theirs, own)
    if not _fits(weights, own):
        statistics = {name: value for name, value in theirs.items() if name.rpartition(".")[2] in STATISTICS}
        weights, beyond = _renamed({name: theirs[name] for name in theirs if name not in statistics}, own)
    weights = _with_counters(weights, own)
    _check_entries(model, own, weights, source)
    # nn.Sequential(normalization, model) calls the model 1.
    _check_normalization(model, statistics, bool(statistics) or "1" in beyond.split("."), source)
    model.load_state_dict(weights, strict=True)


def statistics_of(state_dict: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The `mean` and `std` that a state dict keeps among its weights, three numbers each; {} where it does not."""
    found = {name.rpartition(".")[2]: value for name, value in state_dict.items() if isinstance(name, str)}
    numbers = {name: found[name].flatten().tolist() for name in STATISTICS if isinstance(found.get(name), Tensor)}
    return numbers if [len(values) for values in numbers.values()] == [3, 3] else {}


def _check_state_dict(state_dict: Mapping[str, Tensor], source: str) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{source}: expected a state dict (names to tensors), got a {type(state_dict).__name__}")
    if not state_dict:
        raise ValueError(f"{source}: the state dict is empty")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{source}: expected a state dict (names to tensors), got a {kind} under {name!r}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise ValueError(f"{source}: {name} is not a plain dense tensor")


def _renamed(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Weights with the model's beginning of all names in the place of their own, and what theirs has beyond it."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in theirs.items()}
    before, ours = _common_prefix(plain), _common_prefix(own)
    return {ours + name.removeprefix(before): value for name, value in plain.items()}, before.removesuffix(ours)


def _fits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return weights.keys() | {name for name in own if name.endswith(COUNTER)} == own.keys()


def _common_prefix(names: Iterable[str]) -> str:
    """What all names begin with, up to a dot; the last part of none of them is in it."""
    folders = [f"{name.rpartition('.')[0]}." for name in names]
    common = os.path.commonprefix(folders)
    return common[: common.rfind(".") + 1].removeprefix(".")


def _with_counters(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the model's own counters where they are missing, and as whole numbers."""
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    return {name: value.long() if name in counters else value for name, value in (counters | weights).items()}


def _check_entries(model: nn.Module, own: dict[str, Tensor], weights: dict[str, Tensor], source: str) -> None:
    """The entries have the names, shapes and kinds of the model's own, and finite values."""
    kind = type(model).__name__
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or unexpected:
        differences = [
            f"{what} {_some(map(repr, names))}"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"{source}: the weights do not fit this {kind}: {'; '.join(differences)}")

    misshapen = {name for name in own if own[name].shape != weights[name].shape}
    head = next(reversed(own)).rpartition(".")[0]
    of_head = {name: (weights[name].shape, own[name].shape) for name in own if name.rpartition(".")[0] == head}
    rows = {(theirs[:1], ours[:1]) for theirs, ours in of_head.values() if len(theirs) == len(ours) > 0}
    if misshapen == of_head.keys() and len(rows) == 1 and all(a[1:] == b[1:] for a, b in of_head.values()):
        (((classes,), (expected,)),) = rows
        raise ValueError(f"{source}: the weights are for {classes} classes, the model has {expected}")
    if misshapen:
        shapes = [f"{n!r} of shape {(*weights[n].shape,)} instead of {(*own[n].shape,)}" for n in misshapen]
        raise ValueError(f"{source}: the weights do not fit this {kind}: {_some(shapes)}")

    for name, value in weights.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"{source}: {name} is {value.dtype}, expected {own[name].dtype}")
        if not value.isfinite().all():
            raise ValueError(f"{source}: {name} has NaN or infinite values")


def _check_normalization(model: nn.Module, statistics: dict[str, Tensor], expected: bool, source: str) -> None:
    """A model that normalizes as the weights expect it (else its outputs would be wrong without a sign of it)."""
    layer = next((module for module in model.modules() if isinstance(module, Normalization)), None)
    if expected and layer is None:
        raise ValueError(
            f"{source}: the weights expect normalized input, the model does not normalize (--normalize; "
            "one's own: models.normalization.Normalization in front of it)"
        )
    for name, value in statistics.items():
        own = getattr(layer, name.rpartition(".")[2]).flatten()
        if value.numel() != own.numel() or not torch.allclose(value.flatten().to(own), own, rtol=0, atol=1e-3):
            kind = name.rpartition(".")[2]
            theirs, ours = (", ".join(f"{number:.4f}" for number in v.flatten().tolist()) for v in (value, own))
            raise ValueError(f"{source}: the weights expect input of {kind} {theirs}, the model's is {ours} (--{kind})")


def _some(names: Iterable[str], number: int = 3) -> str:
    """The first few, in order, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + rest
