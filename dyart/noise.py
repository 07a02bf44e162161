"""Where random starts are drawn: for a batch, or for those of its rows that one of several processes has."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class RowsOf(NamedTuple):
    """In the place of a generator, where the examples are some rows of a larger batch.

    What is drawn is drawn for the whole batch, so that no example's noise depends on how its batch is divided.

    Attributes
    ----------
    generator : torch.Generator
    rows : slice
        Which rows the examples are.
    n : int
        The examples of the whole batch.
    """

    generator: torch.Generator
    rows: slice
    n: int


Source: TypeAlias = torch.Generator | RowsOf | None


def draw(sampler: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, source: Source) -> Tensor:
    """Noise of this shape from torch.rand or torch.randn, in the dtype and on the device of `like`.

    It is drawn on the generator's own device, by default that of `like`. Raises ValueError where a `RowsOf` has other
    than shape[0] rows: of a batch of which examples were left out.
    """
    if isinstance(source, RowsOf):
        whole = draw(sampler, (source.n, *shape[1:]), like, source.generator)[source.rows]
        if len(whole) != shape[0]:
            raise ValueError(
                f"noise for {shape[0]} examples, of which {len(whole)} are rows of the batch of {source.n}"
            )
        return whole
    device = like.device if source is None else source.device
    return sampler(shape, generator=source, device=device, dtype=like.dtype).to(like.device)
