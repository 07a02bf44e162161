"""Minimum-norm attacks compared: distances, passes counted by hooks, time. For bench.py --attacks.

The others are those of adv-lib (Rony & Ben Ayed) and FAB of pyautoattack, at their authors' defaults but for the number
of steps, and where the name says so with a step size that suits few steps.
"""

import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn
from tqdm import tqdm

from analysis.cost import Workload
from dyart.minimum_norm import minimum_norm_attack
from dyart.modes import frozen
from dyart.projection import lookup_norm
from storage.files import read_json, write_json

ORDERS = {"Linf": math.inf, "L2": 2}


def _ours(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int) -> Tensor:
    return minimum_norm_attack(model, x, y, norm=norm, passes=steps).x


def _fab(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int) -> Tensor:
    # The radius is that of random restarts, of which there are none.
    return FABAttack_PT(model, norm=norm, n_iter=steps, eps=1.0, device=x.device).attack_single_run(x, y)


def _adv_lib(name: str, **settings: Any) -> Callable[..., Tensor]:
    """An attack of adv-lib; `settings` of which "steps" and "norm" say what it calls these two."""
    steps_as, norm_as = settings.pop("steps", "steps"), settings.pop("norm", None)

    def attack(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int) -> Tensor:
        import adv_lib.attacks

        given = {steps_as: steps} | ({norm_as: ORDERS[norm]} if norm_as else {}) | settings
        return getattr(adv_lib.attacks, name)(model, x, y, **given)

    return attack


# Name: (the attack, the norms that it takes, its numbers of steps).
ATTACKS: dict[str, tuple[Callable[..., Tensor], set[str], list[int]]] = {
    "ours": (_ours, {"Linf", "L2"}, [4, 7, 10, 20, 40, 100, 1000]),
    "FMN": (_adv_lib("fmn", norm="norm"), {"Linf", "L2"}, [10, 20, 50, 100]),
    "FMN, α 0.3": (_adv_lib("fmn", norm="norm", α_init=0.3), {"Linf", "L2"}, [10, 20]),
    "FAB": (_fab, {"Linf", "L2"}, [20, 100]),
    "PDPGD": (_adv_lib("pdpgd", norm="norm", steps="num_steps"), {"Linf"}, [500]),
    "TR": (_adv_lib("tr", norm="p", steps="iter", adaptive=True), {"Linf", "L2"}, [100]),
    "DDN": (_adv_lib("ddn", levels=None), {"L2"}, [10, 20, 50, 100]),
    "SuperDeepFool": (_adv_lib("sdf"), {"L2"}, [100]),
}


def chosen(texts: list[str], norm: str) -> list[tuple[str, int]]:
    """The (attack, steps) of texts like FMN-50 or FMN, or all of the norm where there are none.

    Raises ValueError for what is not in `ATTACKS`, and where it needs a package that is not installed.
    """
    runs = [(name, steps) for name, (_, norms, several) in ATTACKS.items() if norm in norms for steps in several]
    if texts:
        known, runs = {name for name, _ in runs}, []
        for text in texts:
            match = re.fullmatch(r"(.+?)(?:-(\d+))?", text)
            if match is None or match[1] not in known or match[2] == "0":
                raise ValueError(
                    f"--attacks {text}: for {norm} choose from {'; '.join(sorted(known))}, or such as FMN-50"
                )
            runs += [(match[1], int(steps)) for steps in ([match[2]] if match[2] else ATTACKS[match[1]][2])]
    if any(name not in ("ours", "FAB") for name, _ in runs) and importlib.util.find_spec("adv_lib") is None:
        raise ValueError("--attacks: adv-lib is not installed (docs/results.md says how); or name only: ours FAB")
    return runs


class Passes:
    """Counts what goes through a network, in images: `forward` and `backward`."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    @contextmanager
    def counted(self, model: nn.Module) -> Iterator["Passes"]:
        """Count by hooks, as AttackBench does (Cinà et al., 2025), though images and not calls."""

        def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.forward += len(inputs[0])

        def backward(_: nn.Module, __: Any, outputs: tuple[Tensor, ...]) -> None:
            self.backward += len(outputs[0])

        hooks = model.register_forward_pre_hook(forward), model.register_full_backward_hook(backward)
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()


def run_attack(workload: Workload, name: str, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One attack on correctly classified images: distances (inf where none was found), passes an image, seconds."""
    attack, passes, started = ATTACKS[name][0], Passes(), time.monotonic()
    # Some of the others change a flattened view of their input in place, which in another layout is a copy.
    start = x.clone(memory_format=torch.contiguous_format)
    with frozen(workload.model), passes.counted(workload.model):
        adversarial = attack(workload.model, start, y, workload.norm, steps).detach()
    seconds = time.monotonic() - started
    with torch.no_grad():
        flipped = workload.model(adversarial).argmax(1) != y
    inside = ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(1)
    distance = lookup_norm(workload.norm).length((adversarial - x).flatten(1))
    distance = torch.where(flipped & inside, distance, math.inf)
    counts = {"forward": passes.forward / len(x), "backward": passes.backward / len(x)}
    return {"distances": [None if math.isinf(d) else d for d in distance.tolist()], "seconds": seconds} | counts


def compare_attacks(workload: Workload, options: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Run each attack on the correct ones of the images, batch by batch; returns a row of figures for each.

    What has been run is in `output`, which is written after every batch: the same command goes on from there.
    """
    runs = chosen(options["attacks"], workload.norm)
    x, y = workload.x[: options["examples"]], workload.y[: options["examples"]]
    with torch.no_grad():
        correct = torch.cat([workload.model(part).argmax(1) for part in x.split(options["batch_size"])]) == y
    known = read_json(output) if output.exists() else []
    what = {key: workload.identity.get(key) for key in ("checkpoint", "model", "sha256")} | {"norm": workload.norm}
    what |= {key: options[key] for key in ("examples", "batch_size", "seed")}
    batches = [
        rows[correct[rows]] for rows in torch.arange(len(correct), device=correct.device).split(options["batch_size"])
    ]
    for name, steps in tqdm(runs, desc="attacks", leave=False):
        for index, rows in enumerate(batches):
            key = what | {"attack": name, "steps": steps, "batch": index}
            if len(rows) and not any(key.items() <= record.items() for record in known):
                known.append(key | run_attack(workload, name, steps, x[rows], y[rows]))
                write_json(output, known)
    return rows_of([record for record in known if what.items() <= record.items()])


def rows_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of figures for each attack that has been run on all batches, relative to the best distance of any."""
    parts: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for record in records:
        parts.setdefault((record["attack"], record["steps"]), {})[record["batch"]] = record
    batches = {record["batch"] for record in records}
    complete = {key: [of[index] for index in sorted(of)] for key, of in parts.items() if of.keys() == batches}
    distances = {
        key: np.array([math.inf if d is None else d for part in of for d in part["distances"]])
        for key, of in complete.items()
    }
    if not distances:
        return []
    best, rows = np.min(list(distances.values()), axis=0), []
    for (name, steps), distance in distances.items():
        of, found = complete[name, steps], np.isfinite(distance)
        ratio, weights = distance[found] / best[found], [len(part["distances"]) for part in of]
        row = {"attack": name, "steps": steps, "images": len(distance), "found": float(found.mean())}
        row |= {key: float(np.average([part[key] for part in of], weights=weights)) for key in ("forward", "backward")}
        row |= {"seconds": sum(part["seconds"] for part in of), "optimality": optimality(distance, best)}
        if found.any():
            row |= {"mean": float(ratio.mean()), "median": float(np.median(ratio))}
            row |= {"q95": float(np.quantile(ratio, 0.95)), "largest": float(ratio.max())}
        rows.append(row)
    return rows


def optimality(distance: np.ndarray, best: np.ndarray) -> float:
    """AttackBench's local optimality (Cinà et al., 2025, section 3): 1 for the best known attack, 0 for none at all.

    Distances (n,) of the correctly classified images, of an attack and the best known; inf where none was found. The
    area under a curve of robust accuracy up to the ε where the best one ends is the mean of min(distance, ε).
    """
    if not np.isfinite(best).all():
        return math.nan
    end = best.max()
    spare = end - best.mean()
    return float(1 - (np.minimum(distance, end).mean() - best.mean()) / spare) if spare > 0 else math.nan
