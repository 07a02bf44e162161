"""Robust accuracy at every ε from the distances of a minimum-norm attack: an upper bound. For eval.py --curve."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis import figures
from analysis.measure import batches, in_parallel, workers
from analysis.subject import autoattack_points
from data import Split
from dyart.minimum_norm import minimum_norm_attack
from evaluation.environment import device_name, versions
from evaluation.results import Results, images_of
from experiment.flags import Length
from models.outputs import finite_outputs
from storage.files import write_csv, write_json


def measure_distances(model: nn.Module, test: Split, norm: str, passes: int, batch_size: int, desc: str) -> np.ndarray:
    """How far the nearest adversarial example found of each image is, in units of pixels in [0, 1]. (n,)

    0 where the image is misclassified as it is, inf where nothing was found. Raises ValueError, beginning with `desc`,
    where outputs are not finite.
    """
    device = next(model.parameters()).device
    bar = tqdm(total=len(test.labels), desc=desc, unit="image", leave=False)

    def distances_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        # An attack puts its model into another state for a while, so each has its own.
        own = copy.deepcopy(model)
        with finite_outputs(own, desc):
            found = minimum_norm_attack(own, *batch, norm=norm, passes=passes)
        bar.update(len(found.distance))
        return found.distance

    size = min(batch_size, math.ceil(len(test.labels) / workers(device)))
    with bar:
        found = torch.cat(list(in_parallel(distances_of, batches(test, size, model), device)))
    return found.double().cpu().numpy()


def curve_of(distances: np.ndarray) -> list[dict[str, float]]:
    """Robust accuracy over ε as steps: a row for ε = 0 and for each ε at which it falls."""
    eps, counts = np.unique(np.r_[0.0, distances[np.isfinite(distances)]], return_counts=True)
    counts[0] -= 1  # the 0 that was added
    shares = (len(distances) - counts.cumsum()) / len(distances)
    return [{"eps": e, "robust_accuracy": share} for e, share in zip(eps.tolist(), shares.tolist(), strict=True)]


def measure_curve(
    model: nn.Module,
    test: Split,
    identity: Mapping[str, Any],
    lengths: Sequence[Length],
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """The record of a model on the first `n` images of a test set, as `identity` says, with the rows of its curve.

    lengths: the radii of which the record has the robust accuracy by their text.
    """
    started, n = time.monotonic(), identity["n"]
    part = Split(test.images[:n], test.labels[:n])
    desc = f"{identity['checkpoint']} {identity['norm']} distances"
    distances = measure_distances(model.to(device), part, identity["norm"], identity["passes"], batch_size, desc)
    record = {**identity, "test_size": len(test.labels), "clean_accuracy": float(np.mean(distances > 0))}
    record |= {"nothing_found": int(np.isinf(distances).sum())}
    record |= {"robust_accuracy": {text: float(np.mean(distances > eps)) for eps, text in lengths}}
    record |= {"largest_eps": max(eps for eps, _ in lengths), "curve": curve_of(distances)}
    record |= {"seconds": round(time.monotonic() - started, 1), "device": device_name(device), **versions()}
    return record | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """A record of `measure_curve` in words."""
    shares = ", ".join(f"{share:.2%} at {text}" for text, share in record["robust_accuracy"].items())
    what = f"{record['checkpoint']} ({record['weights']} weights), {record['norm']}"
    images = f"{images_of(record)} {record['part']} images"
    lines = [f"{what}, {images}: clean {record['clean_accuracy']:.2%}, robust at most {shares}"]
    if missed := record["nothing_found"]:
        lines.append(f"nothing was found for {missed} of them: they count as robust, and need not be")
    return lines


def write_curves(results: Results, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write curve.json, curve.csv and curve.png where `results` are, beside AutoAttack's points of the same weights."""
    path = results.path.with_name(results.path.name.removesuffix("autoattack.json") + "curve.json")
    panels, rows = [], []
    for record in records:
        points = autoattack_points(results, record, record["norm"], record["part"])
        end = max([record["largest_eps"], *(point["eps"] for point in points)])
        panel = {"title": record["checkpoint"], "norm": record["norm"], "rows": record["curve"]}
        panels.append(panel | {"autoattack": points, "end": 1.25 * end})
        rows += [{"checkpoint": record["checkpoint"], "norm": record["norm"], **row} for row in record["curve"]]
    write_json(path, [{key: value for key, value in record.items() if key != "curve"} for record in records])
    write_csv(path.with_suffix(".csv"), rows)
    figures.curves(path.with_suffix(".png"), panels)
    return path.with_suffix(".png")
