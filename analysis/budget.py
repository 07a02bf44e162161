"""What training costs in passes through the network, and the runs that a budget buys. For scripts/compare_methods.sh.

A pass is one image through the network: forward 1, backward to the input 1, backward to everything 2, as bench.py
counts. A budget is a number of clean epochs' worth of passes, 3 an image each. It pays for all of a training, burn-in
included; evaluation and the choice of a checkpoint cost every method alike and are left out. Multiples of 9 waste the
least: an epoch of TRADES costs 9 clean ones, of MART 8.7, of AT with ten steps 7.7, of AT with three 3.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dyart.losses import SINGLE_STEP
from experiment.recipes import CIFAR10, SHORT, TRAINING

CLEAN = 3.0
# What DyART's price is planned with: the share of images that are right and so are searched. What a run did spend is
# counted from its metrics (`spent`).
PLANNED_CORRECT = 0.55
# The burn-in's share of a budget; that of the short recipe, 4 of some 52 epochs' worth.
BURN_IN_SHARE = 0.08

# The short recipe, of which schedule, batches, rate and numbers of epochs are the comparison's.
_SHORT = {
    "method": "dyart",
    "search": CIFAR10["search"],
    **{name: SHORT[name] for name in ("lambda_robust", "clip_grad")},
}
# The methods of the comparison: flags of train.py. Attacks of few steps take steps of half of ε (Andriushchenko and
# Flammarion, 2020); "dyart" is the paper's recipe with today's search, "dyart-released" with the released one. The
# short recipe stands once for each λ, which is no setting to tune: it says how much clean accuracy robustness may cost.
METHODS: dict[str, dict[str, Any]] = {
    "clean": {"method": "clean"},
    "at-10": {"method": "at", "attack_iter": 10},
    "at-3": {"method": "at", "attack_iter": 3},
    "at-2": {"method": "at", "attack_iter": 2},
    "trades": {"method": "trades", "attack_iter": 10},
    "mart": {"method": "mart", "attack_iter": 10},
    "n-fgsm": {"method": "n-fgsm"},
    "dyart-short": _SHORT,
    "dyart-short-75": _SHORT | {"lambda_robust": 75.0},
    "dyart-short-300": _SHORT | {"lambda_robust": 300.0},
    "dyart": {"method": "dyart", "search": CIFAR10["search"]},
    "dyart-released": {"method": "dyart", "search": "fab"},
}
for _settings in METHODS.values():
    if "search" in _settings:
        _settings["search_steps"] = TRAINING[_settings["search"]]["search_steps"]
# The peak rates that each method is tried with, on the middle budget.
LEARNING_RATES = (0.2, 0.4, 0.8)


def passes_an_image(settings: Mapping[str, Any], correct: float = PLANNED_CORRECT) -> float:
    """What a training step costs an image of the batch.

    Parameters
    ----------
    settings : mapping
        `method`, and where it has them `attack_iter`, `search` and `search_steps`.
    correct : float
        The share of the batch that is classified correctly, which DyART's searches go on with.

    Raises
    ------
    ValueError
        For a method or search whose passes have not been counted.
    """
    method, iterations = settings["method"], settings.get("attack_iter", 0)
    if method == "clean":
        return CLEAN
    if method in SINGLE_STEP:
        return 2 + 3.0
    if method == "at":
        return 2 * iterations + 3.0
    if method == "mart":
        return 2 * iterations + 6.0
    if method == "trades":  # whose attack begins with the probabilities at x
        return 2 * iterations + 7.0
    steps = settings.get("search_steps") or 0
    searches = {
        "shared": 2 * steps * correct,
        "fast": 2 + 2 * steps * correct,
        "fab": 3 + 3 * steps,  # which goes on with all images, and looks at each new point
    }
    if method != "dyart" or settings.get("search") not in searches:
        raise ValueError(f"the passes of {method} with search {settings.get('search')!r} have not been counted")
    return searches[settings["search"]] + 3 * correct + 3


def plan(name: str, budget: float) -> dict[str, Any] | None:
    """The settings of the longest run of a method that a budget pays for; None where it does not buy one epoch."""
    settings = dict(METHODS[name])
    burn_in = max(1, round(BURN_IN_SHARE * budget)) if settings["method"] == "dyart" else 0
    epochs = int((budget - burn_in) * CLEAN / passes_an_image(settings) + 1e-9)
    return {**settings, "burn_in_epochs": burn_in, "epochs": epochs} if epochs >= 1 else None


def spent(settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> float:
    """What a run cost, in clean epochs, from the rows of its metrics.csv: by `passes`, or the share of found points."""
    total = 0.0
    for row in rows:
        clean = row["stage"] in ("burn-in", "clean")
        total += row.get("passes") or (CLEAN if clean else passes_an_image(settings, row.get("found") or 0.0))
    return total / CLEAN
