"""The state a model is put in while something is searched on it, and its exact return from there."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[nn.Module]:
    """Hold `model` in eval mode with no parameter requiring a gradient, and give it back exactly as it was.

    Inside, dropout is off and gradients reach the input only. On the way out, also after an exception, each module
    gets back its own training flag and each parameter its own requires_grad flag, so that a model with some layers
    frozen by its owner keeps them so.

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
    try:
        model.eval()
        model.requires_grad_(False)
        if batch_statistics:
            for module, _ in tracking:
                # Training without tracking, BatchNorm is handed no running statistics, so it cannot change them.
                module.training, module.track_running_stats = True, False
        yield model
    finally:
        for module, flag in training:
            module.training = flag
        for module, flag in tracking:
            module.track_running_stats = flag
        for parameter, flag in required:
            parameter.requires_grad_(flag)
