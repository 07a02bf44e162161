"""A minimum-norm attack: the smallest change of an image that changes the decision, found by the boundary search.

The search of `find_boundary` follows the boundary of the likeliest other class, which is not always the nearest. Here
the boundaries of several classes are linearized at x, and the steps of that search are walked from there: to the class
whose boundary seems nearest, then to others that could still win, and in the end on from the nearest point found.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyart.margin import Boundary, check_batch, logit_margin
from dyart.modes import frozen
from dyart.projection import Norm, has_fixed_shapes, lookup_norm
from dyart.search import CORRECT_ABOVE, OVERSHOOT, WARM_WEIGHT, Nearest, Walk, tiny, walk

# A point is adversarial where the logit margin is below −HAIR, so that it is so in batches of another size too.
HAIR = 1e-5
# A class can still win where its boundary, linearized at x or at a boundary point, is nearer than this multiple of the
# nearest point found.
COULD_WIN_FROM_X, COULD_WIN = 1.3, 1.1


class MinimumNorm(NamedTuple):
    """What `minimum_norm_attack` found. All n rows are there.

    Attributes
    ----------
    x : Tensor (n, ...)
        Adversarial examples in [0, 1]; the original where it is one already, and where none was found.
    found : Tensor (n,), bool
        Whether x is adversarial. Where it is not, nothing is known of how far the boundary is.
    distance : Tensor (n,)
        ‖x' − x‖_p, in units of pixels in [0, 1]: 0 where the original is adversarial, inf where nothing was found.
    """

    x: Tensor
    found: Tensor
    distance: Tensor


class Plan(NamedTuple):
    """Where the passes of a search go.

    Attributes
    ----------
    looked_at : int
        Classes whose boundaries are linearized at x, those of the highest logits: a forward pass, and a backward pass
        for each. The first walk goes to the nearest of them.
    first : int
        Steps of the first walk; each takes a forward and a backward pass.
    walks, each : int
        Walks from x to the next classes that could win, and the steps of each.
    looked_at_again, walks_again : int
        Classes that are linearized at the nearest point then found, and walks from there, of `each` steps too.
    refine : int
        Steps at the end, from the nearest point found.
    bisections : int
        Forward passes that pull the nearest point back to the boundary.
    """

    looked_at: int
    first: int
    walks: int = 0
    each: int = 0
    looked_at_again: int = 0
    walks_again: int = 0
    refine: int = 0
    bisections: int = 0

    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of an image that is classified correctly."""
        steps = self.first + (self.walks + self.walks_again) * self.each + self.refine
        forward = 1 + steps + (self.looked_at_again > 0) + self.bisections
        return forward, self.looked_at + steps + self.looked_at_again


def plan_of(passes: int, most: int = 9) -> Plan:
    """How a search spends `passes` backward passes, and no more forward passes, where it looks at `most` classes.

    Tuned on other weights and images than those of docs/results.md. Up to some 30 passes there is nothing better than
    to look at more classes from x and to walk to one or two; then a second look, from a boundary point, pays.
    """
    if passes < 8:
        plan = Plan(min((passes + 1) // 2, 3, most), 0)
    elif passes < 15:
        plan = Plan(min(4, most), 0)
    elif passes < 35 or most == 1:
        plan = Plan(min(5, most), 6, min(1, most - 1), 4)
    elif passes < 75:
        plan = Plan(min(9, most), 6, 1, 4, min(5, most), min(2, most - 1))
    else:
        plan = Plan(min(9, most), 12, min(3, most - 1), passes // 15, min(9, most), min(4, most - 1))
    left = passes - plan.passes()[1]
    plan = plan._replace(refine=left) if plan.first else plan._replace(first=left)
    return plan._replace(bisections=min(2, passes - plan.passes()[0]))


def minimum_norm_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "Linf",
    passes: int = 20,
    targeted: bool = False,
) -> MinimumNorm:
    """Adversarial examples of nearly the least norm, for a given number of passes through the network.

    The model is attacked in eval mode and is left as it was: mode, parameters, gradients and running statistics.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to logits (n, C), C ≥ 2.
    x : Tensor (n, ...)
        Pixels in [0, 1].
    y : Tensor (n,), int64
        True labels, or with `targeted` the classes to reach.
    norm : str
        "Linf" or "L2".
    passes : int
        At most so many forward and so many backward passes for each image that is not adversarial from the start, at
        least 2; the others take those of the look at x alone (one forward, up to 9 backward), on an accelerator as many
        as the rest. Of a backward pass for another class at the same point the forward pass is spared: a few of those
        go into a bisection at the end.
    targeted : bool
        Whether an example is adversarial where it is classified as y, and not where it is classified otherwise. There
        is one boundary then, and all passes go there.

    Returns
    -------
    MinimumNorm
        What is found is adversarial by strict argmax, by a logit margin of more than `HAIR`, and lies in [0, 1]; its
        distance is an upper bound of the margin and no lower one. Nothing is found where the gradient vanishes, and
        little where it is masked: `found` says so, and such an image is not to be counted as robust.

    Raises
    ------
    ValueError
        For an unknown norm, pixels outside [0, 1], labels that do not fit x, or passes < 2.

    Source: the search is that of `find_boundary`; to compare linearized distances of classes is DeepFool's
    (Moosavi-Dezfooli et al., 2016) and FAB's (Croce & Hein, 2020), who do so at every step.
    """
    network = _Network(model, x.shape[1:], y, targeted, HAIR)
    adversarial, standing, nearest = _search(network, x, norm, passes)
    distance = torch.where(standing, nearest.distance, 0)
    return MinimumNorm(adversarial, distance.isfinite(), distance)


def closest_boundary(model: nn.Module, x: Tensor, labels: Tensor, *, norm: str = "Linf", passes: int = 20) -> Boundary:
    """Points of the exact boundary as from `find_boundary`, of the class that is nearest: to measure margins with.

    Arguments and result are as there, but `grad` is 0 where the example is misclassified; `passes` as in
    `minimum_norm_attack`, without its bisection, and one forward pass more, which tells the misclassified ones. Those
    take no other, but on an accelerator.
    """
    check_batch(x, labels)
    network = _Network(model, x.shape[1:], labels, False, 0.0)
    points, value = x.detach().clone(), x.new_zeros(len(x))
    rows: slice | Tensor = slice(None)
    if len(x) and not has_fixed_shapes(x):
        with frozen(model), torch.no_grad():
            value = network.margin(network.logits(points))
        rows = (value > CORRECT_ABOVE).nonzero()[:, 0]
    boundary = Boundary(points, value > math.inf, torch.zeros_like(value), value, torch.zeros_like(points))
    network = network._replace(y=labels[rows])
    points, standing, nearest = _search(network, boundary.x[rows], norm, passes, bisect=False)
    found = standing & nearest.distance.isfinite()
    margin = torch.where(found, nearest.distance, 0)
    parts = points, found, margin, nearest.value, nearest.grad.view_as(points)
    for field, part in zip(boundary, parts, strict=True):
        field[rows] = part.to(field)
    return boundary


class _View(NamedTuple):
    """What is seen of the network from points (n, d): Φ (n,), and of m classes φ_k (n, m) and ∇φ_k (n, m, d)."""

    value: Tensor
    values: Tensor
    grads: Tensor

    def distances(self, move: Tensor, norm: Norm) -> Tensor:
        """How far the linearized boundaries are from x, of which these are the views at x + move. (n, m)"""
        ahead = self.values - (self.grads * move[:, None]).sum(2)
        steep = torch.stack([norm.dual(grads) for grads in self.grads.unbind(1)], 1)
        return ahead.clamp_min(0) / steep.clamp_min(tiny(move))

    def toward(self, choice: Tensor, move: Tensor) -> Walk:
        """A walk that has come by `move` and goes on to the boundary of one class each. choice: (n,)"""
        rows = torch.arange(len(choice), device=choice.device)
        return Walk(move, self.values[rows, choice], self.grads[rows, choice])


class _Network(NamedTuple):
    """A network and what is to change about its decision: Φ > 0 where it has not changed yet."""

    model: nn.Module
    shape: torch.Size
    y: Tensor
    targeted: bool
    hair: float

    def logits(self, points: Tensor) -> Tensor:
        logits = self.model(points.view(-1, *self.shape))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def margin(self, logits: Tensor) -> Tensor:
        if self.targeted:
            return self.hair - logit_margin(logits, self.y)
        return self.hair + logit_margin(logits, self.y)

    def linearize(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Φ (n,) and its gradient (n, d) at points (n, d)."""
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            value = self.margin(self.logits(points))
            (grad,) = torch.autograd.grad(value.sum(), points)
        return value.detach(), grad

    def look(self, points: Tensor, number: int) -> _View:
        """The view from points (n, d) of the `number` likeliest other classes, or of all where there are fewer."""
        with torch.enable_grad():
            points = points.detach().requires_grad_(True)
            logits = self.logits(points)
            value, y = self.margin(logits), self.y
            if self.targeted:
                values = value[:, None]
            else:
                others = logits.detach().scatter(1, y[:, None], -math.inf)
                classes = others.topk(min(number, others.shape[1] - 1), 1).indices
                values = logits.gather(1, y[:, None]) - logits.gather(1, classes) + self.hair
            grads = [torch.autograd.grad(v.sum(), points, retain_graph=True)[0] for v in values.unbind(1)]
        return _View(value.detach(), values.detach(), torch.stack(grads, 1))


def _search(
    network: _Network, x: Tensor, norm: str, passes: int, bisect: bool = True
) -> tuple[Tensor, Tensor, Nearest]:
    """The nearest points found of all rows, which rows were searched, and what is known at those points."""
    the_norm = lookup_norm(norm)
    if passes < 2:
        raise ValueError(f"passes must be at least 2, got {passes}")
    check_batch(x, network.y)
    x = x.detach()
    origin = x.flatten(1)
    if len(x) == 0:
        nothing = x.new_zeros(0)
        return x, nothing.bool(), Nearest(origin, nothing, nothing, origin)
    plan = plan_of(passes, 1 if network.targeted else 9)
    with frozen(network.model), torch.no_grad():
        view = network.look(origin, plan.looked_at)
        seen = view.values.shape[1]
        plan = plan if seen == plan.looked_at else plan_of(passes, seen)
        standing = view.value > CORRECT_ABOVE
        everywhere = Nearest(origin.clone(), torch.full_like(view.value, math.inf), view.value, view.grads[:, 0])
        rows = slice(None) if has_fixed_shapes(x) else standing.nonzero()[:, 0]
        if len(origin[rows]):
            network = network._replace(y=network.y[rows])
            view = _View(*(field[rows] for field in view))
            nearest = _walk_to_classes(network, origin[rows], standing[rows], view, the_norm, plan)
            if bisect:
                nearest = _pulled_back(network, origin[rows], nearest, the_norm, plan.bisections)
            for field, part in zip(everywhere, nearest, strict=True):
                field[rows] = part
    found = standing & everywhere.distance.isfinite()
    # Of the shape of x from the start and no view of another, which who gets it may not change in place.
    points = torch.where(found.view(-1, *[1] * (x.dim() - 1)), everywhere.point.view_as(x), x)
    return points, standing, everywhere


def _walk_to_classes(network: _Network, x: Tensor, standing: Tensor, view: _View, norm: Norm, plan: Plan) -> Nearest:
    """The nearest points (n, d) that the walks of the plan find; `view` is what was seen of the network from x."""
    nearest = Nearest(x, torch.full_like(view.value, math.inf), view.value, view.grads[:, 0])

    def go(nearest: Nearest, at: Walk, steps: int, weight: float | Tensor) -> tuple[Nearest, Walk]:
        return walk(network.linearize, x, standing, nearest, at, norm, steps, weight, _overshoot)

    def stay(nearest: Nearest, at: Walk) -> Walk:
        """From the nearest point found, or where none was from where the last walk stands."""
        return _chosen(nearest.distance.isfinite(), Walk(nearest.point - x, nearest.value, nearest.grad), at)

    def try_others(nearest: Nearest, at: Walk, order: Tensor, could_win: float) -> tuple[Nearest, Walk]:
        """Walk to the classes in their order (n, walks) where they could win; elsewhere refine the nearest point."""
        for choice in order.unbind(1):
            wins = distances.gather(1, choice[:, None])[:, 0] < could_win * nearest.distance
            at = _chosen(wins, view.toward(choice, move), stay(nearest, at))
            nearest, at = go(nearest, at, plan.each, torch.where(wins, 1.0, WARM_WEIGHT))
        return nearest, at

    move = torch.zeros_like(x)
    distances = view.distances(move, norm)
    order = distances.argsort(1)
    nearest, at = go(nearest, view.toward(order[:, 0], move), plan.first, 1.0)
    nearest, at = try_others(nearest, at, order[:, 1 : 1 + plan.walks], COULD_WIN_FROM_X)
    if plan.looked_at_again:
        move = stay(nearest, at).move
        view = network.look(x + move, plan.looked_at_again)
        # Of the classes beyond whose boundary the point is, a walk has been.
        distances = view.distances(move, norm).where(view.values >= 0, math.inf)
        nearest, at = try_others(nearest, at, distances.argsort(1)[:, : plan.walks_again], COULD_WIN)
    if plan.refine:
        nearest, _ = go(nearest, stay(nearest, at), plan.refine, WARM_WEIGHT)
    return nearest


def _pulled_back(network: _Network, x: Tensor, nearest: Nearest, norm: Norm, times: int) -> Nearest:
    """The points, drawn towards x along a straight line as far as they stay beyond the boundary.

    By bisection with a guess: where the linearized Φ says that 0.9 of the way to the boundary would be, if that is more
    than half of what is left.
    """
    move = nearest.point - x
    slope = (nearest.grad * move).sum(1)
    low, high, value = torch.zeros_like(slope), torch.ones_like(slope), nearest.value
    for _ in range(times):
        middle = (low + high) / 2
        at = torch.where(slope < 0, torch.maximum(high - 0.9 * value / slope, middle), middle)
        there = network.margin(network.logits(x + at[:, None] * move))
        low, high = torch.where(there < 0, low, at), torch.where(there < 0, at, high)
        value = torch.where(there < 0, there, value)
    point = torch.where((high < 1)[:, None], x + high[:, None] * move, nearest.point)
    distance = torch.where(nearest.distance.isfinite(), norm.length(point - x), math.inf)
    return nearest._replace(point=point, distance=distance, value=value)


def _overshoot(step: int, left: float | Tensor, found: Tensor) -> Tensor:
    """As the fast search; but where no point was found yet, it does not fall."""
    return OVERSHOOT * torch.where(found, left, 3)


def _chosen(which: Tensor, first: Walk, second: Walk) -> Walk:
    return Walk(
        *(
            torch.where(which.view(-1, *[1] * (one.dim() - 1)), one, other)
            for one, other in zip(first[:3], second[:3], strict=True)
        )
    )
