"""How close the boundary points of a search come to the closest, and the gradient of the margins to the exact one.

For bench.py.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.cost import Workload
from dyart.losses import SHARED, TRAINING_STEPS, clean_loss, dyart_loss
from dyart.margin import (
    SEARCHES,
    Boundary,
    approach_boundary,
    find_boundary,
    is_locally_closest,
    value_and_gradient,
)
from dyart.modes import frozen

REFERENCE_STEPS = 100


def measure_quality(workload: Workload, options: dict[str, Any]) -> list[dict[str, Any]]:
    """How close each search comes, as multiples of the distances that a long one finds.

    The long search is the released recipe (--search fab) with 100 iterations, but started at x: a random start finds
    longer distances. Of the points of --search shared, which nobody looks at in training, it is said here on which side
    they lie: found are those beyond the boundary, and the distances are those of all; if adaptive, also of those that
    are too far to be worth another linearization.

    Of the gradient of DyART's robust term in the parameters, with r0 and alpha of the training, without filter and
    overshoot, on each whole batch in train mode: its cosine with the one at the long search's points, and its norm as a
    multiple of that one's, as means over the batches, and the least cosine; nothing where that one is 0.
    """
    count, size = options["examples"], options["batch_size"]
    fast, shared = ({TRAINING_STEPS[search], *options["steps"]} for search in ("fast", SHARED))
    fast |= {SEARCHES["fast"][1]}
    searches: dict[str, dict[str, Any]] = {f"fast, {steps} steps": {"steps": steps} for steps in sorted(fast)}
    searches |= {f"shared, {steps} steps": {"search": SHARED, "steps": steps} for steps in sorted(shared)}
    searches["shared, adaptive"] = {"search": SHARED, "steps": TRAINING_STEPS[SHARED], "adaptive_steps": True}
    searches["fab, 20 steps (released)"] = {"search": "fab"}
    runs = {"reference": {"search": "fab", "steps": REFERENCE_STEPS, "init_radius": 0.0}} | searches
    margins: dict[str, list[Tensor]] = {name: [] for name in runs}
    found: dict[str, list[Tensor]] = {name: [] for name in runs}
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
                boundary = _search(workload, x, y, generator, **arguments)
            margins[name].append(boundary.margin)
            found[name].append(boundary.found)
            kept[name].append(is_locally_closest(x, boundary, workload.norm))
            values[name].append(boundary.value)
    against = _gradients_against_the_first(workload, options, runs)
    reference = torch.cat(margins["reference"])
    figures = []
    for name in runs:
        margin, is_found = torch.cat(margins[name]), torch.cat(found[name])
        counts = (margin > 0) & (reference > 0)
        ratio = (margin / reference)[counts].double()
        row = {"search": name, "examples": len(margin), "found": is_found.double().mean().item()}
        row["kept"] = torch.cat(kept[name]).double().mean().item()
        if len(ratio):
            row |= {"ratio_mean": ratio.mean().item(), "ratio_median": ratio.median().item()}
            row |= {"ratio_95": ratio.quantile(0.95).item(), "margin_median": margin[counts].median().item()}
            row["distance_from_boundary"] = torch.cat(values[name])[counts].abs().mean().item()
        if against[name]:
            cosines, norms = torch.tensor(against[name]).unbind(1)
            row |= {"gradient_cosine": cosines.mean().item(), "gradient_cosine_least": cosines.min().item()}
            row |= {"gradient_norm": norms.mean().item(), "gradient_batches": len(cosines)}
        figures.append(row)
    return figures


def _search(
    workload: Workload,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    search: str = "fast",
    adaptive_steps: bool = False,
    **arguments: Any,
) -> Boundary:
    """Boundary points with Φ and ∇_x Φ where they lie, in eval mode."""
    if search != SHARED:
        return find_boundary(workload.model, x, y, norm=workload.norm, search=search, generator=generator, **arguments)
    reach = workload.objective["r0"] if adaptive_steps else None
    boundary = approach_boundary(workload.model, x, y, norm=workload.norm, reach=reach, **arguments)
    with frozen(workload.model):
        value, grad = value_and_gradient(workload.model, boundary.x, y)
    return boundary._replace(found=boundary.found & (value < 0), value=value, grad=grad.view_as(x))


def _gradients_against_the_first(
    workload: Workload, options: dict[str, Any], runs: dict[str, dict[str, Any]]
) -> dict[str, list[tuple[float, float]]]:
    """Cosine and norm of each search's gradient on each whole batch, by that of the first search, where it is not 0."""
    size, against = options["batch_size"], {name: [] for name in runs}
    for start in range(0, max(options["examples"] - size, 0) + 1, size):
        gradients = _robust_gradients(workload, slice(start, start + size), options["seed"], runs)
        exact = next(iter(gradients.values()))
        for name, gradient in gradients.items() if exact.any() else ():
            cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0)
            against[name].append((cosine.item(), (gradient.norm() / exact.norm()).item()))
    return against


def _robust_gradients(
    workload: Workload, batch: slice, seed: int, runs: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """The gradient of the robust term on a batch in the parameters, in train mode, flat; for each search."""
    x, y = workload.x[batch], workload.y[batch]

    def gradient_of(loss_function: Callable[..., tuple[Tensor, Any]], **arguments: Any) -> Tensor:
        model = copy.deepcopy(workload.model)
        with workload.autocast():
            loss, _ = loss_function(model, x, y, **arguments)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])

    clean, gradients = gradient_of(clean_loss), {}
    for name, arguments in runs.items():
        generator = torch.Generator(x.device).manual_seed(seed)
        objective = {**workload.objective, "lambda_robust": 1.0, "norm": workload.norm, "high_quality": False}
        gradients[name] = gradient_of(dyart_loss, **objective, generator=generator, **arguments) - clean
    return gradients
