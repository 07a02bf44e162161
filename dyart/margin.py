"""Logit margins, the closest point of the decision boundary, and the closed-form gradient of the margin.

Notation as in Xu et al., 2023: φ and Φ_β are the logit margin and the soft logit margin, x̂ is the closest boundary
point of x, and R = ‖x̂ − x‖_p is the margin. β is called `temperature`; β = inf stands for the exact boundary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyart.graphs import CudaGraphs
from dyart.modes import frozen
from dyart.noise import Source, draw
from dyart.projection import Norm, lookup_norm
from dyart.search import (
    CORRECT_ABOVE,
    SEARCHES,
    WARM_WEIGHT,
    Nearest,
    turn,
)

# Bound on 1 / ‖∇_x Φ‖_q. It acts only where the logit margin changes by less than 0.001 over the whole unit box.
MAX_GRADIENT_WEIGHT = 1e3
# For which margins a linearization is worth another, as multiples of the reach of `approach_boundary`: the second, and
# those after it. The first puts some margins at twice of what they are (docs/results.md).
WORTH_ANOTHER = ((1 / 8, 2.0), (1 / 8, 1.25))


class Boundary(NamedTuple):
    """Boundary points of a batch. All n rows are there; rows with `found` False hold the original x, at margin 0.

    Attributes
    ----------
    x : Tensor (n, ...)
        The closest point found on the far side of the boundary, Φ < 0, in [0, 1].
    found : Tensor (n,), bool
        Whether the example is correctly classified and a boundary point was found.
    margin : Tensor (n,)
        ‖x̂ − x‖_p, in units of pixels in [0, 1].
    value : Tensor (n,)
        Φ(x̂), in the rows not found Φ(x).
    grad : Tensor (n, ...)
        ∇_x Φ(x̂), in the rows not found ∇_x Φ(x).
    """

    x: Tensor
    found: Tensor
    margin: Tensor
    value: Tensor
    grad: Tensor


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """φ = z_y − max_{k≠y} z_k (n,) of logits (n, C) and labels (n,) int64: positive where the prediction is right."""
    true, others = _split(logits, labels)
    return true - others.amax(1)


def soft_logit_margin(logits: Tensor, labels: Tensor, temperature: float = 5.0) -> Tensor:
    """Φ_β = z_y − (1/β) log Σ_{k≠y} exp(β z_k) (Xu et al., 2023, section 4).

    φ − log(C−1)/β ≤ Φ_β ≤ φ: the soft boundary lies on the safe side of the exact one.

    Parameters
    ----------
    logits : Tensor (n, C), C ≥ 2
    labels : Tensor (n,), int64
    temperature : float
        β > 0; inf gives the logit margin φ itself.

    Returns
    -------
    Tensor (n,)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if math.isinf(temperature):
        return logit_margin(logits, labels)
    true, others = _split(logits, labels)
    return true - torch.logsumexp(temperature * others, 1) / temperature


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the label (n,), and the others (n, C) with -inf in its place; at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
    return logits.gather(1, labels[:, None])[:, 0], logits.masked_fill(is_label, -math.inf)


def find_boundary(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    norm: str = "Linf",
    temperature: float = 5.0,
    search: str = "fast",
    steps: int | None = None,
    init_radius: float | None = None,
    generator: Source = None,
    start: Tensor | None = None,
    graphs: CudaGraphs | None = None,
) -> Boundary:
    """Find the closest point of the decision boundary Φ_β = 0 for every correctly classified example of a batch.

    The model is searched in eval mode and is left as it was: mode, parameters, gradients and running statistics.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to logits (n, C).
    x : Tensor (n, ...)
        Pixels in [0, 1].
    labels : Tensor (n,), int64
    norm : str
        "Linf" or "L2".
    temperature : float
        β of the soft logit margin; inf for the exact boundary.
    search : str
        "fast" (one pass through the network per step) or "fab" (the released recipe).
    steps : int, optional
        Iterations of the search; by default the search's own number, see `SEARCHES`.
    init_radius : float, optional
        The search starts at x plus uniform noise scaled to norm init_radius / 2, or at x where it is 0; by default
        the search's own. Pixels in [0, 1].
    generator : torch.Generator or RowsOf, optional
        Source of that noise, see `dyart.noise.draw`.
    start : Tensor (n, ...), optional
        Where the search starts instead: boundary points found before, for weights that have changed little since, say.
        From other points "fast" takes many more steps, since it keeps to where it starts.
    graphs : CudaGraphs, optional
        On a GPU, capture the search at its first call for a shape of x and replay it from then on.

    Returns
    -------
    Boundary

    Raises
    ------
    ValueError
        For an unknown norm or search, pixels outside [0, 1], labels or a start that do not fit x, or steps < 1.

    Source: Xu et al., 2023, section 4; Croce & Hein, 2020 (FAB), on the one scalar function Φ_β.
    """
    the_norm = lookup_norm(norm)
    if search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}: choose from {', '.join(SEARCHES)}")
    search_function, default_steps, default_radius = SEARCHES[search]
    steps = default_steps if steps is None else steps
    init_radius = default_radius if init_radius is None else init_radius
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_batch(x, labels)
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must have the shape of x, {tuple(x.shape)}, got {tuple(start.shape)}")
    x = x.detach()
    if x.shape[0] == 0:
        nothing = x.new_zeros(0)
        return Boundary(x, nothing.bool(), nothing, nothing, x)

    shape = x.shape[1:]

    def nearest_points(origin: Tensor, begin: Tensor, labels: Tensor) -> Nearest:
        def linearize(points: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
            return value_and_gradient(model, points.view(-1, *shape), labels[rows], temperature)

        def evaluate(points: Tensor, rows: Tensor | slice) -> Tensor:
            return soft_logit_margin(model(points.view(-1, *shape)), labels[rows], temperature)

        weight = 1.0 if start is None else WARM_WEIGHT
        return search_function(linearize, evaluate, origin, begin, the_norm, steps, weight)

    origin = x.flatten(1)
    with frozen(model), torch.no_grad():
        begin = _noisy_start(origin, the_norm, init_radius, generator) if start is None else start.detach().flatten(1)
        if graphs is None:
            nearest = nearest_points(origin, begin, labels)
        else:
            key = (id(model), shape, norm, temperature, search, steps, start is None)
            nearest = Nearest(*graphs(nearest_points, origin, begin, labels, key=key))
    found = nearest.distance.isfinite()
    return Boundary(
        x=torch.where(found[:, None], nearest.point, origin).view(x.shape),
        found=found,
        margin=torch.where(found, nearest.distance, 0),
        value=nearest.value,
        grad=nearest.grad.view(x.shape),
    )


def check_batch(x: Tensor, labels: Tensor) -> None:
    """Raise ValueError where labels do not fit x, or a pixel is outside [0, 1]."""
    _check_labels(x, labels)
    _check_box(((x >= 0) & (x <= 1)).all())


def checked_rows(x: Tensor, labels: Tensor, among: Tensor) -> Tensor:
    """The rows of a mask (n,), in order. Raises ValueError as `check_batch` does.

    A GPU is asked for their number and for the check at once, since each answer waits for all that it has to do; so
    they are not taken by `nonzero`, which would ask again.
    """
    _check_labels(x, labels)
    among = among.to(x.device)
    within, count = torch.stack([((x >= 0) & (x <= 1)).all(), among.sum()]).tolist()
    _check_box(within)
    return among.byte().argsort(descending=True, stable=True)[:count]


def _check_labels(x: Tensor, labels: Tensor) -> None:
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must have shape ({x.shape[0]},) to fit x, got {tuple(labels.shape)}")


def _check_box(within: Tensor | int) -> None:
    if not within:
        raise ValueError("x must lie in [0, 1]")


def value_and_gradient(
    model: nn.Module, pixels: Tensor, labels: Tensor, temperature: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Φ (m,) and ∇_x Φ (m, d) at `pixels` (m, ...): one forward and one backward pass through the network as it is."""
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_(True)
        value = soft_logit_margin(model(pixels), labels, temperature)
        (grad,) = torch.autograd.grad(value.sum(), pixels)
    return value.detach(), grad.flatten(1)


def _noisy_start(origin: Tensor, norm: Norm, init_radius: float, generator: Source) -> Tensor:
    if init_radius == 0:
        return origin
    noise = draw(torch.rand, origin.shape, origin, generator) * 2 - 1
    noise *= init_radius / 2 / norm.length(noise)[:, None]
    return (origin + noise).clamp_(0, 1)


def approach_boundary(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    among: Tensor | None = None,
    norm: str = "Linf",
    temperature: float = 5.0,
    steps: int = 1,
    reach: float | None = None,
) -> Boundary:
    """Boundary points that are good enough to train on, for one pass through the network or a few.

    Where `find_boundary` looks at Φ beyond the points that it returns, this returns those where the last linearization
    has its boundary: on which side of the true one that is, nobody has looked. The pass that is trained on will see. To
    measure margins there is `find_boundary`.

    Parameters
    ----------
    model, x, labels, norm, temperature
        As in `find_boundary`.
    among : Tensor (n,), bool, optional
        The examples that can be correctly classified, as far as is known. The others cost nothing and are not found.
    steps : int
        Linearizations, at least 1: the first at x. Each takes one pass of the examples that it is for.
    reach : float, optional
        The margins that matter are those below, in pixels of [0, 1]. Each further linearization is then for the
        examples that those before put between so many times the reach: `WORTH_ANOTHER`. The others are near enough to
        be found already, or too far to come into reach. By default it is for all.

    Returns
    -------
    Boundary
        `found`: correctly classified. `value` and `grad` are those of the last linearization, which was taken one step
        before `x` is reached; with one step, those at the original x.

    Raises
    ------
    ValueError
        For an unknown norm, pixels outside [0, 1], labels that do not fit x, steps < 1, or a reach that is not positive
        and finite.
    """
    arguments = {"norm": norm, "temperature": temperature, "steps": steps, "reach": reach}
    return approach_counting(model, x, labels, among=among, **arguments)[0]


def approach_counting(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    *,
    among: Tensor | None,
    norm: str,
    temperature: float,
    steps: int,
    reach: float | None,
) -> tuple[Boundary, int, Tensor]:
    """`approach_boundary`, how many images it has linearized at, each as often as it was, and the rows it has found."""
    the_norm = lookup_norm(norm)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if reach is not None and not 0 < reach < math.inf:
        raise ValueError(f"reach must be positive and finite, got {reach}")
    rows = checked_rows(x, labels, torch.ones_like(labels, dtype=torch.bool) if among is None else among)
    margins = torch.zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    found, points, values, grads = margins.bool(), x.detach().clone(), margins.clone(), torch.zeros_like(x)
    count, reached = len(rows), rows
    if len(rows):
        with frozen(model), torch.no_grad():
            value, grad = value_and_gradient(model, x.detach()[rows], labels[rows], temperature)
            steepness = the_norm.dual(grad)
            right = ((value > CORRECT_ABOVE) & (steepness > 0) & steepness.isfinite()).nonzero()[:, 0]
            reached = rows = rows[right]
            value, grad = value[right], grad[right]
            origin = x.detach()[rows].flatten(1)
            move, normal = torch.zeros_like(origin), None
            for step in range(steps):
                if step and reach is not None:
                    least, most = WORTH_ANOTHER[min(step, len(WORTH_ANOTHER)) - 1]
                    again = ((margins[rows] > least * reach) & (margins[rows] < most * reach)).nonzero()[:, 0]
                    rows, origin, move, normal = rows[again], origin[again], move[again], normal[again]
                if not len(rows):
                    break
                if step:
                    value, grad = value_and_gradient(model, points[rows], labels[rows], temperature)
                    count += len(rows)
                # Bolder than the fast search, which has more steps to mend what one spoils: nearer to the direction of
                # the closest point, and not so much longer than the way there (docs/results.md).
                weight = 1 - step / (steps + 3)
                move, onto, normal = turn(origin, move, normal, value, grad, the_norm, weight, latest=0.7)
                at = (origin + onto[:, None] * move).clamp(0, 1)
                move = at - origin
                found[rows], points[rows] = True, at.view(-1, *x.shape[1:])
                margins[rows], values[rows] = the_norm.length(move), value
                grads[rows] = grad.view(-1, *x.shape[1:])
    return Boundary(points, found, margins, values, grads), count, reached


def is_locally_closest(x: Tensor, boundary: Boundary, norm: str = "Linf") -> Tensor:
    """Quality filter: which boundary points nearly satisfy the optimality conditions of the closest point. (n,) bool

    With δ = x̂ − x, a point of the closest boundary is just beyond it, −0.3 < Φ(x̂) < 0, and for

    - "Linf": the gradient points against δ, δ_i ∂_iΦ < −1e-7, on more than 0.9 of the coordinates that moved by more
      than 0.8 ‖δ‖_∞, and not all of the others (if any) have |∂_iΦ| > 0.1;
    - "L2": over the coordinates that the box leaves free, the cosine between δ and −∇Φ is more than 0.8.

    Parameters
    ----------
    x : Tensor (n, ...)
        The examples whose boundary points these are.
    boundary : Boundary
    norm : str

    Source: Xu et al., 2023 (the released recipe's `use_high_quality`) for "Linf"; the "L2" rule is this project's.
    """
    lookup_norm(norm)
    move = (boundary.x - x).flatten(1)
    grad = boundary.grad.flatten(1)
    plausible = boundary.found & (boundary.value < 0) & (boundary.value > -0.3)
    return plausible & _IS_LOCALLY_CLOSEST[norm](x.flatten(1), move, grad)


def _is_locally_closest_linf(x: Tensor, move: Tensor, grad: Tensor) -> Tensor:
    far = move.abs() > 0.8 * move.abs().amax(1, keepdim=True)
    opposed = (far & (move * grad < -1e-7)).sum(1) > 0.9 * far.sum(1)
    steep = (~far & (grad.abs() > 0.1)).sum(1)
    others = (~far).sum(1)
    return opposed & ((steep < others) | (others == 0))


def _is_locally_closest_l2(x: Tensor, move: Tensor, grad: Tensor) -> Tensor:
    reached = x + move
    free = ((reached > 0) | (grad < 0)) & ((reached < 1) | (grad > 0))
    return nn.functional.cosine_similarity(move * free, -grad * free, dim=1) > 0.8


_IS_LOCALLY_CLOSEST = {"Linf": _is_locally_closest_linf, "L2": _is_locally_closest_l2}


def margin_gradient_weights(boundary: Boundary, norm: str = "Linf") -> Tensor:
    """1 / ‖∇_x Φ(x̂)‖_q, so that the gradient of (weight · Φ(x̂; θ)) in θ is the margin gradient ∇_θ R. (n,)

    The weight is 0 where no boundary point was found, and at most `MAX_GRADIENT_WEIGHT`, so that a vanishing gradient
    cannot blow a training step up.

    Source: Xu et al., 2023, proposition on the closed form of the margin gradient.
    """
    weights = lookup_norm(norm).dual(boundary.grad.flatten(1)).reciprocal().clamp_max(MAX_GRADIENT_WEIGHT)
    return torch.where(boundary.found, weights, 0)
