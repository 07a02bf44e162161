"""What a run tells of its epochs: sums over batches, the row of metrics.csv, the line of the log. For train.py."""

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiment.processes import packed, unpacked


class Meter:
    """Sums over the batches of an epoch, of which it gives means and, for margins, quantiles."""

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state or {"images": 0, "steps": 0, "seconds": 0.0, "sums": {}, "margins": torch.zeros(0)}

    def add(self, metrics: dict[str, Tensor], grad_norm: float, images: int) -> None:
        """Take in a step: means over its images, its margins (with nan for none), its gradient norm; all `on_host`."""
        metrics = dict(metrics)
        margins = metrics.pop("margins", torch.zeros(0)).float()
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        sums, begun = self.state["sums"], bool(self.state["images"])
        for name, value in zip(metrics, values, strict=True):
            if name in sums or not begun:  # one that a version before did not have comes too late to be a mean of all
                sums[name] = sums.get(name, 0.0) + value * images
        sums["grad_norm"] = sums.get("grad_norm", 0.0) + grad_norm * images
        self.state["images"] += images
        self.state["steps"] += 1
        self.state["margins"] = torch.cat([self.state["margins"], margins[~margins.isnan()]])

    def means(self) -> dict[str, float]:
        """The mean of each metric over the images seen."""
        return {name: total / self.state["images"] for name, total in self.state["sums"].items()}

    def summary(self, norm: str) -> dict[str, str]:
        """What the progress bar shows: loss, clean accuracy, boundary points found, mean margin."""
        means = self.means()
        shown = {"loss": f"{means['loss']:.3f}"} if "loss" in means else {}
        shown |= {
            name: f"{means[key]:.1%}" for name, key in (("clean", "clean_accuracy"), ("found", "found")) if key in means
        }
        margins = self.state["margins"]
        return shown | ({"margin": shown_length(255 * margins.mean().item(), norm)} if len(margins) else {})

    def margin_quantiles(self) -> dict[str, float]:
        """Mean and quantiles of the margins found, in units of 1/255 (in every norm)."""
        margins = self.state["margins"].double().sort().values * 255
        if not len(margins):
            return {}
        row = {"margin_mean": margins.mean().item()}
        for percent in (10, 25, 50, 75, 90):
            row[f"margin_q{percent}"] = margins[round(percent / 100 * (len(margins) - 1))].item()
        return row


def on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """The values on the CPU: of a GPU all in one transfer, since each waits for what the GPU still has to do.

    They are gathered where the first one lies.
    """
    return unpacked(packed(values, values[0].device).cpu(), values)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: of the GPU since the last reset, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def shown_length(value: float, norm: str) -> str:
    """A length in units of 1/255 for people, who write l2 lengths in units of a pixel's range."""
    return f"{value / 255:.3f}" if norm == "L2" else f"{value:.2f}/255"


def describe(row: dict[str, Any], norm: str) -> str:
    """The line that the log has of an epoch."""
    parts = [f"epoch {row['epoch']} ({row['stage']})", f"lr {row['lr']:.4g}", f"loss {row.get('loss', math.nan):.4f}"]
    parts += [
        f"{name.replace('_', ' ')} {row[name]:.1%}" for name in ("clean_accuracy", "found", "kept") if name in row
    ]
    if "margin_mean" in row:
        parts.append(f"margin {shown_length(row['margin_mean'], norm)}")
    parts += [f"validation clean {row['val_clean']:.1%} robust {row['val_robust']:.1%}", f"{row['seconds']:.0f} s"]
    return ", ".join(parts)
