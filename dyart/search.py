"""The searches for boundary points, step by step: the fast one, the released one, and the walk of which they are made.

They know of the network what `linearize` tells, Φ (m,) and ∇_x Φ (m, d) at points (m, d), and `evaluate`, Φ alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dyart.projection import Norm, has_fixed_shapes

# Examples with a smaller Φ count as misclassified: they have no margin (Xu et al., 2023, released recipe).
CORRECT_ABOVE = 1e-9
# Share of its length that the fast search adds to its first move, to end beyond the boundary.
OVERSHOOT = 0.04
# Weight of the first step of a fast search from boundary points found before. In narrow valleys of the boundary a
# larger one throws them away for points further off, and a smaller one is slow.
WARM_WEIGHT = 0.2


class Nearest(NamedTuple):
    """The closest point with Φ < 0 seen so far, for each of m examples; `distance` is inf where there is none."""

    point: Tensor
    distance: Tensor
    value: Tensor
    grad: Tensor

    def update(self, eligible: Tensor, *candidate: Tensor) -> "Nearest":
        """Take the candidate (point, distance, value, grad) where it is eligible and closer."""
        closer = eligible & (candidate[1] < self.distance)
        return Nearest(
            *(
                torch.where(closer.view(-1, *[1] * (old.dim() - 1)), new, old)
                for old, new in zip(self, candidate, strict=True)
            )
        )


def _search_fab(
    linearize: Callable,
    evaluate: Callable,
    origin: Tensor,
    start: Tensor,
    norm: Norm,
    steps: int,
    weight: float,  # of the first step; this search has its own for each
) -> Nearest:
    """The released recipe: noise at the start and two passes through the network per step.

    Each step meets the linearized boundary from the iterate and from x, and mixes the two points per example in favour
    of the shorter move. A forward pass tells on which side the step has ended, and one more forward and backward pass
    serves the next step; a last one takes the gradient at the points found.
    """
    value = evaluate(origin, slice(None))
    correct = value > CORRECT_ABOVE
    distance = torch.full_like(value, math.inf)
    best = origin
    at = start
    for _ in range(steps):
        value, grad = linearize(at, slice(None))
        move = norm.project(at, grad, -value)
        move_x = norm.project(origin, grad, -value - (grad * (origin - at)).sum(1))
        length, length_x = norm.length(move), norm.length(move_x)
        mix = (length / (length + length_x).clamp_min(tiny(origin))).clamp_max(0.1)[:, None]
        at = ((1 - mix) * (at + 1.05 * move) + mix * (origin + 1.05 * move_x)).clamp_(0, 1)
        crossed = evaluate(at, slice(None)) < 0
        reached = norm.length(at - origin)
        closer = correct & crossed & (reached < distance)
        distance = torch.where(closer, reached, distance)
        best = torch.where(closer[:, None], at, best)
        at = torch.where(crossed[:, None], origin + 0.9 * (at - origin), at)
    return Nearest(best, distance, *linearize(best, slice(None)))


def _search_fast(
    linearize: Callable,
    evaluate: Callable,
    origin: Tensor,
    start: Tensor,
    norm: Norm,
    steps: int,
    weight: float,
) -> Nearest:
    """One pass per step: Φ at the point reached, and its gradient for the next step, for the filter and the weights.

    Each step averages the gradients met so far, in favour of the latest; takes the shortest move from x along that
    average onto the linearized boundary; mixes it into the move so far with a weight that falls linearly from `weight`,
    as in the Frank-Wolfe method; and scales the mixture onto the linearized boundary of the latest point. What it then
    adds, to end beyond the boundary, falls likewise.

    On the CPU only the correctly classified rows are searched; on an accelerator all rows are, so that shapes are fixed
    and nothing waits for the device.
    """
    value, grad = linearize(origin, slice(None))
    correct = value > CORRECT_ABOVE
    everywhere = Nearest(origin.clone(), torch.full_like(value, math.inf), value, grad)
    rows = slice(None) if has_fixed_shapes(origin) else correct.nonzero()[:, 0]
    nearest = Nearest(*(field[rows] for field in everywhere))
    searched, correct = origin[rows], correct[rows]
    value, grad = (value[rows], grad[rows]) if start is origin else linearize(start[rows], rows)
    at = Walk(start[rows] - searched, value, grad)
    nearest, _ = walk(lambda points: linearize(points, rows), searched, correct, nearest, at, norm, steps, weight)
    for field, part in zip(everywhere, nearest, strict=True):
        field[rows] = part
    return everywhere


class Walk(NamedTuple):
    """Where a search stands: its moves from x (n, d), Φ (n,) and ∇Φ (n, d) there, the average of its gradients so far.

    The average is None before the first step.
    """

    move: Tensor
    value: Tensor
    grad: Tensor
    normal: Tensor | None = None


def walk(
    linearize: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    correct: Tensor,
    nearest: Nearest,
    at: Walk,
    norm: Norm,
    steps: int,
    weight: float | Tensor,
    overshoot: Callable[[int, float | Tensor, Tensor], Tensor] | None = None,
) -> tuple[Nearest, Walk]:
    """The steps of the fast search from where it stands: the closest points known afterwards, and where it stands then.

    The weight may differ between examples (n,). `overshoot` says what a step adds to its moves, of the number of the
    step, its weight, and which examples have a point beyond the boundary.
    """
    move, value, grad, normal = at
    for step in range(steps):
        left = weight * (1 - step / steps)
        mixing = left[:, None] if isinstance(left, Tensor) else left
        move, onto, normal = turn(x, move, normal, value, grad, norm, mixing)
        found = nearest.distance.isfinite()
        beyond = (overshoot or _falling_overshoot)(step, left, found)
        at = (x + ((1 + beyond) * onto)[:, None] * move).clamp_(0, 1)
        move = at - x
        value, grad = linearize(at)
        nearest = nearest.update(correct & (value < 0), at, norm.length(move), value, grad)
    return nearest, Walk(move, value, grad, normal)


def _falling_overshoot(step: int, left: float | Tensor, found: Tensor) -> Tensor:
    return OVERSHOOT * left * torch.where(found, 1, 3)


def turn(
    x: Tensor,
    move: Tensor,
    normal: Tensor | None,
    value: Tensor,
    grad: Tensor,
    norm: Norm,
    weight: float | Tensor,
    latest: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the moves (n, d) from x by what is known of Φ at x + move: one step of the fast search.

    Returns the moves, the factors (n,) that bring them onto the boundary of the linearized Φ, and the average of the
    gradients met so far, in which the latest has the weight `latest`; the next step wants it for `normal`, the first
    has None.
    """
    steepness = norm.dual(grad).clamp_min(tiny(x))
    unit = grad / steepness[:, None]
    normal = unit if normal is None else (1 - latest) * normal + latest * unit
    gain = (unit * move).sum(1) - value / steepness
    move = (1 - weight) * move + weight * norm.project(x, normal, gain)
    onto = (gain / (unit * move).sum(1)).nan_to_num(nan=1.0).clamp(0.5, 2)
    return move, onto, normal


def tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


SEARCHES = {
    # search: (function, default steps, default init_radius), to measure margins; training is content with fewer steps,
    # `TRAINING_STEPS` in dyart/losses.py. With 10, fast comes within 3 % of a 100-iteration fab also on weights in the
    # midst of DyART, whose boundaries bend most; elsewhere 6 do (bench.py).
    "fast": (_search_fast, 10, 0.0),
    "fab": (_search_fab, 20, 8 / 255),
}
