"""Outputs that are no numbers: argmax takes them for class 0, so whoever counts correct predictions looks first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def check_finite_outputs(outputs: Tensor, source: str) -> None:
    """Raise ValueError, beginning with `source`, where one of the outputs (n, ...) is NaN or infinite."""
    bad = ~outputs.isfinite().flatten(1).all(1)
    if bad.any():
        first = bad.nonzero()[0].item()
        raise ValueError(
            f"{source}: the model's outputs are not finite for {bad.sum().item()} of {len(bad)} images, "
            f"{outputs[first].flatten()[:3].tolist()}, ... for no. {first} of its batch: no accuracy can be told"
        )


@contextmanager
def finite_outputs(model: nn.Module, source: str) -> Iterator[None]:
    """Within, every pass through `model` is held to `check_finite_outputs`."""

    def check(module: nn.Module, inputs: Any, outputs: Tensor) -> None:
        check_finite_outputs(outputs.detach(), source)

    with model.register_forward_hook(check):
        yield
