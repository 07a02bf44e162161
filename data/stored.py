"""Images that stay on disk and are handled like those in memory: selected by indexing, read where they are needed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data.generated import Auxiliary


class StoredImages:
    """Images (N,H,W,3) uint8 of a file, or some of them, in the place of a tensor of images in a `Split`.

    Indexing gives a selection, which has been read as little as the whole; `read` gives the tensor. Nothing is copied
    to a device beforehand.
    """

    def __init__(self, source: Auxiliary, rows: torch.Tensor | None = None):
        self.source = source
        self.rows = torch.arange(len(source)) if rows is None else rows
        self.shape = (len(self.rows), *source.image_shape)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __getitem__(self, index: slice | torch.Tensor) -> "StoredImages":
        """The images at `index`, a slice or a tensor of numbers or truth values; nothing is read."""
        return StoredImages(self.source, self.rows[index.cpu() if isinstance(index, torch.Tensor) else index])

    def to(self, *_: Any) -> "StoredImages":
        """Itself: a batch goes to the device when it has been read."""
        return self

    def read(self) -> torch.Tensor:
        """The images (N,H,W,3) uint8. Raises DataFileError if the file has shrunk."""
        return self.source.rows(self.rows.numpy()).images

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Another process opens the file by itself."""
        source = self.source
        return _open, (source.path, source.offset, source.image_shape, source.labels, self.rows.numpy())


def _open(path: Any, offset: int, shape: tuple[int, int, int], labels: np.ndarray, rows: np.ndarray) -> StoredImages:
    return StoredImages(Auxiliary(path, offset, shape, labels), torch.from_numpy(rows))
