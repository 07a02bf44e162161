"""Generated training images (DDPM, EDM): .npz files far larger than memory."""

import torch  # noqa: F401
import numpy as np

from data.files import Split


class Auxiliary:
    """Images (N,H,W,3) uint8 and labels (N,) that stay on disk."""

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, index: np.ndarray) -> Split:
        raise NotImplementedError
