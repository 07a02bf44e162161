"""How close the boundary points of a search come to the closest. For bench.py."""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.cost import Workload
from dyart.margin import SEARCHES, find_boundary, is_locally_closest

REFERENCE_STEPS = 100


def measure_quality(workload: Workload, options: dict[str, Any]) -> list[dict[str, Any]]:
    """How close each search comes, as multiples of the distances that a long one finds.

    The long search is the released recipe (--search fab) with 100 iterations, but started at x: a random start finds
    longer distances.
    """
    count, size = options["examples"], options["batch_size"]
    default = SEARCHES["fast"][1]
    searches = {f"fast, {steps} steps": {"steps": steps} for steps in sorted({default, *options["steps"]})}
    searches["fab, 20 steps (released)"] = {"search": "fab"}
    runs = {"reference": {"search": "fab", "steps": REFERENCE_STEPS, "init_radius": 0.0}} | searches
    margins: dict[str, list[Tensor]] = {name: [] for name in runs}
    kept: dict[str, list[Tensor]] = {name: [] for name in runs}
    values: dict[str, list[Tensor]] = {name: [] for name in runs}
    correct = workload.correct()[:count]
    if not correct.any():
        return []
    generator = torch.Generator(workload.x.device).manual_seed(options["seed"])
    for start in tqdm(range(0, count, size), desc="quality", leave=False):
        rows = torch.arange(start, min(start + size, count), device=correct.device)[correct[start : start + size]]
        for name, arguments in runs.items():
            x, y = workload.x[rows], workload.y[rows]
            with workload.autocast():
                boundary = find_boundary(workload.model, x, y, norm=workload.norm, generator=generator, **arguments)
            margins[name].append(torch.where(boundary.found, boundary.margin, math.inf))
            kept[name].append(is_locally_closest(x, boundary, workload.norm))
            values[name].append(boundary.value)
    reference = torch.cat(margins["reference"])
    figures = []
    for name in runs:
        margin, found = torch.cat(margins[name]), torch.cat(margins[name]).isfinite()
        ratio = (margin / reference)[found & reference.isfinite()].double()
        row = {"search": name, "examples": len(margin), "found": found.double().mean().item()}
        row["kept"] = torch.cat(kept[name]).double().mean().item()
        if len(ratio):
            row |= {"ratio_mean": ratio.mean().item(), "ratio_median": ratio.median().item()}
            row |= {"ratio_95": ratio.quantile(0.95).item(), "margin_median": margin[found].median().item()}
            row["distance_from_boundary"] = torch.cat(values[name])[found].abs().mean().item()
        figures.append(row)
    return figures
