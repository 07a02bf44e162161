"""Exact projections onto the intersection of a hyperplane and the box [0, 1]^d, and what else depends on the norm.

A norm is one entry in `NORMS`; whatever takes a `norm` argument looks it up there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# On an accelerator the number of Newton steps is fixed, so that nothing waits for the device. Moves as long as margins
# take 3 to 6 at the size of images; only hyperplanes at the far end of the box take more than 12, and only with l2.
ACCELERATOR_STEPS = 12


def has_fixed_shapes(x: Tensor) -> bool:
    """Whether work on `x` keeps to shapes and numbers of steps that do not depend on values: not on the CPU."""
    return x.device.type != "cpu"


def project_linf(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The move of smallest l-infinity norm from x onto a hyperplane, within the box.

    Parameters
    ----------
    x : Tensor (n, d)
        Points in [0, 1].
    w : Tensor (n, d)
        Normals of the hyperplanes.
    c : Tensor (n,)
        What the move must gain along w.

    Returns
    -------
    Tensor (n, d)
        δ of smallest ‖δ‖_∞ with w·δ = c and x + δ in [0, 1]. Where the box cannot reach the hyperplane, δ goes as far
        as the box allows. Coordinates with w_i = 0 stay.

    Source: the problem is that of Croce & Hein, 2020 (FAB), section 3; solved by Newton's method instead of a sort.
    """
    return _project(x, w, c, lambda size: torch.ones_like(size))


def project_l2(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The move of smallest Euclidean norm from x onto a hyperplane, within the box; see `project_linf`."""
    return _project(x, w, c, lambda size: size)


def _project(x: Tensor, w: Tensor, c: Tensor, rate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Moves δ_i = sign(c w_i) min(λ rate_i, room_i) with the smallest λ ≥ 0 such that w·δ = c.

    By the KKT conditions the closest point has this form, with rate = 1 for l-infinity and rate = |w| for l2. The reach
    f(λ) = Σ|w_i| min(λ rate_i, room_i) is concave, increasing and piecewise linear: Newton's method from λ = 0
    approaches the root from below and ends on it exactly, after at most as many steps as f has pieces.
    """
    # In units of the largest |w_i|, no product of two weights underflows; no box is wider than Σ|w_i|.
    unit = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    size = w.abs() / unit
    rate = rate_of(size)
    target = (c.abs() / unit[:, 0]).clamp_max(x.shape[1] + 1)
    direction = torch.sign(c)[:, None] * torch.sign(w)
    room = torch.where(direction > 0, 1 - x, x)
    scale = torch.zeros_like(c)
    fixed = has_fixed_shapes(x)
    for _ in range(ACCELERATOR_STEPS if fixed else x.shape[1]):
        move = scale[:, None] * rate
        missing = target - (size * torch.minimum(move, room)).sum(1)
        slope = (size * rate * (move < room)).sum(1)
        step = torch.where(slope > 0, missing / slope, 0).clamp_min(0)
        scale = scale + step
        if not fixed and not (step > 4 * torch.finfo(x.dtype).eps * scale).any():
            break
    return direction * torch.minimum(scale[:, None] * rate, room)


class Norm(NamedTuple):
    """What the method needs to know of a norm: its projection, itself and its dual on the rows of (n, d)."""

    project: Callable[[Tensor, Tensor, Tensor], Tensor]
    length: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor], Tensor]


def _row_norm(order: float) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.linalg.vector_norm(rows, order, dim=1)


NORMS = {
    "Linf": Norm(project_linf, _row_norm(float("inf")), _row_norm(1)),
    "L2": Norm(project_l2, _row_norm(2), _row_norm(2)),
}


def lookup_norm(norm: str) -> Norm:
    """The entry of `NORMS`; raises ValueError with the accepted names for any other."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    return NORMS[norm]
