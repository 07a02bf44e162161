"""A run in TensorBoard, where --tensorboard asks for it: curves, margins and a page of images, in FOLDER/tensorboard.

For train.py. The package `tensorboard` is optional: `pip install .[tensorboard]`.
"""

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Split, to_input
from dyart.margin import find_boundary
from experiment.state import Run

SHOWN = 8  # Images of the page.
# Where the columns of metrics.csv stand that are not of training.
GROUPS = {"lr": "run", "seconds": "run", "peak_memory_mib": "run", "bad_steps": "run", "negative_speeds": "run"}


def check_tensorboard(wanted: bool) -> None:
    """Raise ValueError where TensorBoard is asked for and not installed."""
    if wanted and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs the package tensorboard; pip install tensorboard")


class Board(contextlib.AbstractContextManager):
    """What TensorBoard shows of a run; nothing at all where the settings do not ask for it. A context manager.

    What an earlier process wrote of epochs after the first `finished` ones is hidden, since they are trained again.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, validation: Split, finished: int) -> None:
        self._writer = None
        self._shown = Split(validation.images[:SHOWN], validation.labels[:SHOWN])
        if settings["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter  # which needs the package

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=finished + 1)

    def add_epoch(self, row: Mapping[str, Any], margins: Tensor, run: Run) -> None:
        """A finished epoch: its row of metrics.csv, its margins (pixels in [0, 1]) in 1/255, images of the average."""
        if self._writer is None:
            return
        epoch = row["epoch"]
        for name, value in row.items():
            if name not in ("epoch", "stage") and value is not None:
                self._writer.add_scalar(_tag(name), value, epoch)
        if len(margins):
            self._writer.add_histogram("margins/found, in 1 of 255", 255 * margins, epoch)
        if len(self._shown.labels):
            self._writer.add_image("x, boundary point, difference", self._page(run), epoch)
        self._writer.flush()

    def _page(self, run: Run) -> Tensor:
        """Three rows (3, 3h, nw): held-out images x, x̂, and δ = x̂ − x, gray where it is 0, stretched to the full range.

        An image without a boundary point, since it is misclassified, has itself in the second row.
        """
        device = next(run.average.model.parameters()).device
        x, y = to_input(self._shown.images).to(device), self._shown.labels.to(device)
        options = {"norm": run.settings["norm"], "temperature": run.settings["temperature"]}
        delta = find_boundary(run.average.model, x, y, **options).x - x
        largest = delta.flatten(1).abs().amax(1).clamp_min(torch.finfo(delta.dtype).tiny)
        rows = [x, x + delta, 0.5 + 0.5 * delta / largest[:, None, None, None]]
        return torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(0, 1)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _tag(column: str) -> str:
    for prefix, group in (("val_", "validation"), ("margin_", "margins")):
        if column.startswith(prefix):
            return f"{group}/{column.removeprefix(prefix)}"
    return f"{GROUPS.get(column, 'training')}/{column}"
