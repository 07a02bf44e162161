"""Projected gradient descent (PGD): the one attack that the baselines train on and that validation measures with.

A norm is one entry in `BALLS`, an objective one in `OBJECTIVES`, a starting point one in `STARTS`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyart.margin import check_batch, logit_margin
from dyart.modes import frozen
from dyart.noise import Source, draw

# Newton steps of the l2 projection. Each result lies in the ball, so that stopping early costs length and no more.
PROJECTION_STEPS = 10


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "Linf",
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    objective: str = "ce",
    start: str = "uniform",
    within: str = "ball",
    restarts: int = 1,
    keep: str = "last",
    mode: str = "eval",
    generator: Source = None,
) -> Tensor:
    """Attack a batch by projected gradient ascent on an objective, in a ball around each example and in the box [0, 1].

    The model is left as it was: mode, parameters, gradients and running statistics.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to logits (n, C), C ≥ 2.
    x : Tensor (n, ...)
        Pixels in [0, 1].
    y : Tensor (n,), int64
        True labels.
    norm : str
        "Linf" (steps along the sign of the gradient) or "L2" (steps along the gradient, normalized).
    eps : float
        Radius of the ball, in units of pixels in [0, 1].
    step_size : float
        Length of a step in that norm, same units.
    steps : int
        Number of steps; 0 returns the starting point.
    objective : str
        What is maximized: "ce", the cross-entropy; "cw", max_{k≠y} z_k − z_y (Carlini & Wagner, 2017); "kl",
        KL(p(x) ‖ p(x')) with p(x) held constant (Zhang et al., 2019), which does not look at y.
    start : str
        "uniform" in the ball, "wide" for uniform in the ball of radius 2 eps (de Jorge et al., 2022), "normal" for
        0.001 × standard normal noise, or "none" for x itself.
    within : str
        What start and steps are projected onto: "ball", the ball and the box; "box", the box alone.
    restarts : int
        Number of runs. From more than one, each example gets the end point with the highest objective.
    keep : str
        What a run ends with: "last", the point after the last step, or "worst", the point with the highest objective
        among all those it went through (one more forward pass).
    mode : str
        "eval" for running BatchNorm statistics; "batch" for those of each attacked batch, which are not written back.
        Dropout is off in both.
    generator : torch.Generator or RowsOf, optional
        Source of the starting noise, see `dyart.noise.draw`.

    Returns
    -------
    Tensor (n, ...)
        x', detached, in [0, 1] and, unless `within` is "box", within eps of x.

    Raises
    ------
    ValueError
        For an unknown name, a number out of range, pixels outside [0, 1], labels that do not fit x, or objective "kl"
        with start "none": the divergence has no gradient at x.

    Source: Madry et al., 2018, section 2.1.
    """
    ball = _lookup("norm", norm, BALLS)
    score = _lookup("objective", objective, OBJECTIVES)
    first_move = _lookup("start", start, STARTS)
    project = _lookup("within", within, {"ball": ball.project, "box": lambda at, x, eps: at.clamp(0, 1)})
    keep_worst = _lookup("keep", keep, {"last": False, "worst": True})
    batch_statistics = _lookup("mode", mode, {"eval": False, "batch": True})
    for argument, value, least in (
        ("eps", eps, 0),
        ("step_size", step_size, 0),
        ("steps", steps, 0),
        ("restarts", restarts, 1),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"{argument} must be finite and at least {least}, got {value}")
    if objective == "kl" and start == "none":
        raise ValueError("objective 'kl' has no gradient at x itself: start must be 'uniform' or 'normal', got 'none'")
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must have shape (n, ...) and y shape (n,), got {tuple(x.shape)} and {tuple(y.shape)}")
    check_batch(x, y)
    if x.shape[0] == 0:
        return x.detach().clone()

    with frozen(model, batch_statistics=batch_statistics), torch.no_grad():
        clean_log_probs = log_probabilities(model(x)) if objective == "kl" else None

        def scores(at: Tensor) -> Tensor:
            return score(model(at), y, clean_log_probs)

        worst, highest = x.clone(), x.new_full((x.shape[0],), -math.inf)
        for _ in range(restarts):
            at = project(x + first_move(x, eps, ball, generator), x, eps)
            for _ in range(steps):
                with torch.enable_grad():
                    at.requires_grad_(True)
                    value = scores(at)
                    (grad,) = torch.autograd.grad(value.sum(), at)
                if keep_worst:
                    worst, highest = _higher(worst, highest, at, value)
                at = project(at + step_size * ball.steepest(torch.nan_to_num(grad)), x, eps)
            if keep_worst or restarts > 1:
                worst, highest = _higher(worst, highest, at, scores(at))
    return worst if keep_worst or restarts > 1 else at


def _lookup(argument: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"unknown {argument} {name!r}: choose from {', '.join(table)}")
    return table[name]


def _higher(worst: Tensor, highest: Tensor, at: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    higher = value > highest
    return torch.where(higher.view(-1, *[1] * (at.dim() - 1)), at, worst), torch.where(higher, value, highest)


def log_probabilities(logits: Tensor) -> Tensor:
    """Logarithm of the softmax probabilities of logits (n, C), in float32 at least: also under autocast. (n, C)"""
    return F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row, from log-probabilities (n, C); differentiable in both. (n,)"""
    return (log_p.exp() * (log_p - log_q)).sum(1)


# (logits at x', labels, log p(x)) -> what is maximized, (n,).
OBJECTIVES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "ce": lambda logits, y, _: F.cross_entropy(logits, y, reduction="none"),
    "cw": lambda logits, y, _: -logit_margin(logits, y),
    "kl": lambda logits, _, clean_log_probs: kl_divergence(clean_log_probs, log_probabilities(logits)),
}


class Ball(NamedTuple):
    """What the attack needs to know of a norm.

    Attributes
    ----------
    steepest : (grad (n, ...)) -> (n, ...)
        The move of length 1 that gains most along the gradient; 0 where the gradient is 0.
    project : (at (n, ...), x (n, ...), eps) -> (n, ...)
        The point within eps of x and in [0, 1] that is nearest to `at` in the Euclidean sense.
    uniform : (x (n, ...), eps, generator) -> (n, ...)
        Moves drawn uniformly from the ball of radius eps.
    """

    steepest: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor, float], Tensor]
    uniform: Callable[[Tensor, float, Source], Tensor]


def _project_linf(at: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.clamp(at, x - eps, x + eps).clamp(0, 1)


def _uniform_linf(x: Tensor, eps: float, generator: Source) -> Tensor:
    return eps * (2 * draw(torch.rand, x.shape, x, generator) - 1)


def _steepest_l2(grad: Tensor) -> Tensor:
    axes = tuple(range(1, grad.dim()))
    # In units of its largest entry no gradient is so small or so large that its squares underflow or overflow.
    largest = grad.abs().amax(axes, keepdim=True)
    grad = grad / torch.where(largest > 0, largest, 1)
    return grad / torch.linalg.vector_norm(grad, dim=axes, keepdim=True).clamp_min(1)


def _project_l2(at: Tensor, x: Tensor, eps: float) -> Tensor:
    """By the KKT conditions the nearest point of ball ∩ box is x + √t (at − x) clamped to the box, for one t ≤ 1.

    Its squared distance from x is Σ min(t d_i², room_i²): concave, increasing and piecewise linear in t. Newton's
    method from t = 0 approaches eps² from below; its first step is the projection onto the ball alone.
    """
    axes = tuple(range(1, x.dim()))
    move = at - x
    square, room = move.square(), torch.where(move > 0, 1 - x, x).square()
    t = torch.zeros_like(square.sum(axes, keepdim=True))
    for _ in range(PROJECTION_STEPS):
        missing = eps**2 - torch.minimum(t * square, room).sum(axes, keepdim=True)
        slope = (square * (t * square < room)).sum(axes, keepdim=True)
        t = (t + missing.clamp_min(0) / slope.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
    return (x + t.sqrt() * move).clamp(0, 1)


def _uniform_l2(x: Tensor, eps: float, generator: Source) -> Tensor:
    direction = _steepest_l2(draw(torch.randn, x.shape, x, generator))
    radius = draw(torch.rand, (x.shape[0], *[1] * (x.dim() - 1)), x, generator) ** (1 / x[0].numel())
    return eps * radius * direction


BALLS = {
    "Linf": Ball(torch.sign, _project_linf, _uniform_linf),
    "L2": Ball(_steepest_l2, _project_l2, _uniform_l2),
}

# (x, eps, ball, generator) -> the first move.
STARTS: dict[str, Callable[[Tensor, float, Ball, Source], Tensor]] = {
    "uniform": lambda x, eps, ball, generator: ball.uniform(x, eps, generator),
    "wide": lambda x, eps, ball, generator: ball.uniform(x, 2 * eps, generator),
    "normal": lambda x, eps, ball, generator: 0.001 * draw(torch.randn, x.shape, x, generator),
    "none": lambda x, eps, ball, generator: torch.zeros_like(x),
}
