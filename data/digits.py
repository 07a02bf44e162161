"""scikit-learn's 8x8 handwritten digits at 32x32x3: a real dataset that needs no network."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.files import Split

TEST_PER_CLASS = 40


def load_digits(data_dir: str | Path = "", *, download: bool = True) -> tuple[Split, Split]:
    """Return (train, test): 1397 and 400 images (N,32,32,3) uint8; the test split has 40 images of each class.

    The images are scikit-learn's `load_digits`, scaled bilinearly. The arguments are those of every dataset; nothing
    is read from or written to disk. The test images lie evenly spaced among those of their class, so that each writer
    (the file is ordered by writer) is in both splits.
    """
    from sklearn.datasets import load_digits as load_from_sklearn  # here: it takes a second to import

    digits = load_from_sklearn()
    small = torch.from_numpy(digits.images).unsqueeze(1)  # (1797,1,8,8), values 0 to 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False) * (255 / 16)
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    labels = torch.from_numpy(digits.target.astype(np.int64))

    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = torch.nonzero(labels == label).squeeze(1)
        is_test[rows[torch.arange(TEST_PER_CLASS) * len(rows) // TEST_PER_CLASS]] = True
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])
