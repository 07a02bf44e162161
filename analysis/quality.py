"""How close the boundary points of a search come to the closest, and the gradient of the margins to the exact one.

For bench.py.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.cost import Workload
from dyart.losses import SHARED, SHARED_STEPS, dyart_loss
from dyart.margin import SEARCHES, Boundary, approach_boundary, find_boundary, is_locally_closest, soft_logit_margin

REFERENCE_STEPS = 100


def measure_quality(workload: Workload, options: dict[str, Any]) -> list[dict[str, Any]]:
    """How close each search comes, as multiples of the distances that a long one finds.

    The long search is the released recipe (--search fab) with 100 iterations, but started at x: a random start finds
    longer distances. Of the points of --search shared, which nobody looks at in training, it is said here on which side
    they lie: found are those beyond the boundary, and the distances are those of all.

    Of the gradient of DyART's robust term in the parameters, without filter and overshoot, on one batch in train mode:
    its cosine with the one at the long search's points, and its norm as a multiple of that one's.
    """
    count, size = options["examples"], options["batch_size"]
    fast, shared = ({default, *options["steps"]} for default in (SEARCHES["fast"][1], SHARED_STEPS))
    searches: dict[str, dict[str, Any]] = {f"fast, {steps} steps": {"steps": steps} for steps in sorted(fast)}
    searches |= {f"shared, {steps} steps": {"search": SHARED, "steps": steps} for steps in sorted(shared)}
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
    reference, exact = torch.cat(margins["reference"]), _robust_gradient(workload, options, **runs["reference"])
    figures = []
    for name, arguments in runs.items():
        margin, is_found = torch.cat(margins[name]), torch.cat(found[name])
        counts = (margin > 0) & (reference > 0)
        ratio = (margin / reference)[counts].double()
        row = {"search": name, "examples": len(margin), "found": is_found.double().mean().item()}
        row["kept"] = torch.cat(kept[name]).double().mean().item()
        if len(ratio):
            row |= {"ratio_mean": ratio.mean().item(), "ratio_median": ratio.median().item()}
            row |= {"ratio_95": ratio.quantile(0.95).item(), "margin_median": margin[counts].median().item()}
            row["distance_from_boundary"] = torch.cat(values[name])[counts].abs().mean().item()
        gradient = _robust_gradient(workload, options, **arguments)
        row["gradient_cosine"] = torch.nn.functional.cosine_similarity(gradient, exact, dim=0).item()
        row["gradient_norm"] = (gradient.norm() / exact.norm()).item()
        figures.append(row)
    return figures


def _search(
    workload: Workload, x: Tensor, y: Tensor, generator: torch.Generator, *, search: str = "fast", **arguments: Any
) -> Boundary:
    """Boundary points with Φ and ∇_x Φ where they lie, in eval mode."""
    if search != SHARED:
        return find_boundary(workload.model, x, y, norm=workload.norm, search=search, generator=generator, **arguments)
    boundary = approach_boundary(workload.model, x, y, norm=workload.norm, **arguments)
    pixels = boundary.x.requires_grad_(True)
    value = soft_logit_margin(workload.model(pixels), y)
    (grad,) = torch.autograd.grad(value.sum(), pixels)
    value = value.detach()
    return boundary._replace(x=boundary.x.detach(), found=boundary.found & (value < 0), value=value, grad=grad)


def _robust_gradient(workload: Workload, options: dict[str, Any], **arguments: Any) -> Tensor:
    """The gradient of the margins' mean on the first batch in the parameters, in train mode, flat."""
    batch = slice(options["batch_size"])
    gradients = []
    for weight in (1.0, 0.0):
        model = copy.deepcopy(workload.model)
        generator = torch.Generator(workload.x.device).manual_seed(options["seed"])
        with workload.autocast():
            loss, _ = dyart_loss(
                model,
                workload.x[batch],
                workload.y[batch],
                lambda_robust=weight,
                alpha=0.0,
                r0=math.inf,
                norm=workload.norm,
                high_quality=False,
                generator=generator,
                **arguments,
            )
        gradients.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]))
    return gradients[0] - gradients[1]
