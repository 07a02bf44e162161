"""The state and the precision of a model while something is searched on it, and its exact return from there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Where autocast is to lower the precision: "searches" are attacks and boundary searches.
PRECISIONS = ("none", "searches", "bf16")
# The kind of device that searches are autocast on, where they are.
_SEARCHES_ON: ContextVar[str | None] = ContextVar("searches_on", default=None)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by instructions of its own; elsewhere it is several times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not in every version of PyTorch that serves.
    return device.type != "cpu" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


@contextmanager
def mixed_precision(amp: str, device_type: str) -> Iterator[None]:
    """Autocast to bfloat16: nothing ("none"), all ("bf16"), or all that happens to a `frozen` model ("searches").

    The last takes attacks and boundary searches in bfloat16, and in float32 what the parameters are trained on. Like
    torch.autocast it holds for the present thread.
    """
    if amp not in PRECISIONS:
        raise ValueError(f"unknown precision {amp!r}: choose from {', '.join(PRECISIONS)}")
    token = _SEARCHES_ON.set(device_type if amp == "searches" else None)
    try:
        with torch.autocast(device_type, torch.bfloat16, enabled=amp == "bf16"):
            yield
    finally:
        _SEARCHES_ON.reset(token)


@contextmanager
def frozen(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[nn.Module]:
    """Hold `model` in eval mode with no parameter requiring a gradient, and give it back exactly as it was.

    Inside, dropout is off and gradients reach the input only. On the way out, also after an exception, each module
    gets back its own training flag and each parameter its own requires_grad flag, so that a model with some layers
    frozen by its owner keeps them so. Autocast is on where `mixed_precision` asks for it in searches.

    Parameters
    ----------
    model : nn.Module
    batch_statistics : bool
        Normalize by the statistics of each batch, as in training, instead of the running ones. The running
        statistics and their batch counter are not written to.
    """
    training = [(module, module.training) for module in model.modules()]
    tracking = [(module, module.track_running_stats) for module, _ in training if isinstance(module, _BatchNorm)]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kind = _SEARCHES_ON.get()
    autocast = nullcontext() if kind is None else torch.autocast(kind, torch.bfloat16)
    try:
        model.eval()
        model.requires_grad_(False)
        if batch_statistics:
            for module, _ in tracking:
                # Training without tracking, BatchNorm is handed no running statistics, so it cannot change them.
                module.training, module.track_running_stats = True, False
        with autocast:
            yield model
    finally:
        for module, flag in training:
            module.training = flag
        for module, flag in tracking:
            module.track_running_stats = flag
        for parameter, flag in required:
            parameter.requires_grad_(flag)


@contextmanager
def batch_norm_momentum(model: nn.Module, momentum_of: Callable[[float], float]) -> Iterator[None]:
    """Hold the momentum of every BatchNorm at what `momentum_of` makes of its own; None, a plain mean, stays."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = momentum_of(layer.momentum)
    try:
        yield
    finally:
        for layer, value in zip(layers, usual, strict=True):
            layer.momentum = value
