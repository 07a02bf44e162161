"""Predicted boundary speeds held against what a small step really does to the margins. For analyze.py."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis import figures
from analysis.measure import Search, batches, find, replaced
from data import Split
from dyart.dynamics import (
    Direction,
    boundary_speed,
    refined_margin,
)
from dyart.margin import Boundary

# A step of this length, of parameters whose Euclidean norm is in the tens, is small enough for speeds to hold, and
# large enough for the margins' changes to stand out from the errors of the search.
CHECK_STEP = 1e-2


CHECK_SEARCH_STEPS = 40


# Searches end when none of them comes closer by this share of the margin, or after so many in turn.
CHECK_TOLERANCE = 1e-4


CHECK_ROUNDS = 20


def check_speeds(
    model: nn.Module, examples: Split, search: Search, along: dict[str, Direction]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Take a small step along each direction, search again, and compare the margins' changes with the speeds.

    In double precision and with long searches: the changes are far smaller than the errors of others. Even so, one
    search can end at a part of the boundary that the next one passes by, or on the way along a narrow valley, and what
    lies between two such ends is no change of the margin. So each model is searched again from the closest points that
    are known of both, until neither comes closer. What is tested are the speeds at the points found, and not that
    these are the closest of all.
    """
    model = copy.deepcopy(model).double()
    search = search._replace(steps=CHECK_SEARCH_STEPS)
    rows, results, known = [], {}, []
    for x, y in batches(examples, search.batch_size, model):
        (before,), _ = _settle([model], [find(model, x, y, search)], x, y, search)
        known.append((x, y, before))
    for method, direction in along.items():
        direction = {name: value.double() for name, value in direction.items()}
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += CHECK_STEP * direction[name]
        predicted, measured, unsettled = [], [], 0
        bar = tqdm(known, desc=f"measured speed of {figures.NAMES[method]}", unit="batch", leave=False)
        for index, (x, y, before) in enumerate(bar):
            (before, after), moving = _settle([model, moved], [before, find(moved, x, y, search)], x, y, search)
            known[index] = x, y, before
            both = before.found & after.found
            change = refined_margin(x, after, search.norm) - refined_margin(x, before, search.norm)
            kind = {"norm": search.norm, "temperature": search.temperature, "x": x}
            predicted.append(boundary_speed(model, before, y, direction, **kind)[both])
            measured.append(change[both] / CHECK_STEP)
            unsettled += moving
        speed, change = torch.cat(predicted).cpu().numpy(), torch.cat(measured).cpu().numpy()
        table = zip(speed.tolist(), change.tolist(), strict=True)
        rows += [{"method": method, "speed": s, "measured": m} for s, m in table]
        # Without a margin before or after the step there is no change of it.
        counts = {"without_margin": len(examples.labels) - len(speed), "unsettled": unsettled}
        results[method] = _agreement(speed, change) | counts
    return rows, results


def _settle(
    models: Sequence[nn.Module], found: Sequence[Boundary], x: Tensor, y: Tensor, search: Search
) -> tuple[list[Boundary], int]:
    """Search each model in turn from the boundary points found of the last one, until none comes closer.

    Returns the closest points of each, and of how many examples one still came closer in the last round.
    """
    found, moving = list(found), torch.arange(len(y), device=y.device)
    for _ in range(CHECK_ROUNDS):
        closer = torch.zeros(len(moving), dtype=torch.bool, device=y.device)
        for index, model in enumerate(models):
            old, last = (Boundary(*(field[moving] for field in found[i])) for i in (index, index - 1))
            new = find(model, x[moving], y[moving], search, last.x)
            better = new.found & (~old.found | (new.margin < old.margin))
            closer |= new.found & (~old.found | (new.margin < (1 - CHECK_TOLERANCE) * old.margin))
            found[index] = replaced(found[index], moving[better], Boundary(*(field[better] for field in new)))
        moving = moving[closer]
        if len(moving) == 0:
            break
    return found, len(moving)


def _agreement(speed: np.ndarray, change: np.ndarray) -> dict[str, Any]:
    """How well measured changes agree with predicted speeds; None for what is not defined."""
    if len(speed) == 0:
        return {"examples": 0, "correlation": None, "equal_signs": None, "median_relative_error": None}
    varies = min(np.ptp(speed), np.ptp(change)) > 0
    return {
        "examples": len(speed),
        "correlation": float(np.corrcoef(speed, change)[0, 1]) if varies else None,
        "equal_signs": float(np.mean((speed > 0) == (change > 0))),
        "median_relative_error": float(np.median(np.abs(change - speed) / np.abs(speed))) if speed.all() else None,
    }
