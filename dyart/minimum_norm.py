"""A minimum-norm attack: the smallest change of an image that changes the decision, found by the boundary search.

The search of `dyart.margin` follows the runner-up's boundary from x, which is not always the nearest. Here it is run in
rounds: from a point that it has found, other classes whose boundaries may be nearer get a walk of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyart.margin import OVERSHOOT, WARM_WEIGHT, Nearest, Walk, check_batch, logit_margin, walk
from dyart.modes import frozen
from dyart.projection import Norm, lookup_norm

# Points count as adversarial where the logit margin is below this, so that it is so in batches of another size too.
HAIR = 1e-5
# A class can still win where its linearized boundary is nearer than this multiple of the nearest point found.
COULD_WIN = 1.1


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
    """How many passes go where: steps of the first walk, classes looked at from its end, walks to some of them, the
    steps of each, the steps that refine what is nearest, and forward passes of the bisection."""

    first: int
    looked_at: int
    walks: int
    each: int
    refine: int
    bisections: int


def plan_of(passes: int, classes: int) -> Plan:
    """How `passes` forward and as many backward passes are spent on a model with so many classes."""
    if passes < 10:
        return Plan(passes - 1, 1, 0, 0, 0, 0)
    if passes < 15:
        looked_at, walks, each = 3, 1, 3
    elif passes < 40:
        looked_at, walks, each = 5, 2, 3
    else:
        looked_at, walks, each = 9, 4, passes // 12
    looked_at = min(looked_at, classes - 1)
    walks = min(walks, looked_at - 1)
    extra = looked_at - 1
    left = passes - 1 - extra - walks * each
    first = max(left // 2, 4) if passes < 40 else 10
    return Plan(first, looked_at, walks, each, left - first, extra)


def minimum_norm_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str = "Linf",
    passes: int = 20,
    targeted: bool = False,
    plan: Plan | None = None,
) -> MinimumNorm:
    """Adversarial examples of nearly the least norm."""
    the_norm = lookup_norm(norm)
    check_batch(x, y)
    x = x.detach()
    if x.shape[0] == 0:
        return MinimumNorm(x, x.new_zeros(0).bool(), x.new_zeros(0))
    origin, shape = x.flatten(1), x.shape[1:]
    with frozen(model), torch.no_grad():
        value, grad, logits = _linearize(model, origin, shape, y, None, targeted)
        if plan is None:
            plan = plan_of(passes, 2 if targeted else logits.shape[1])
        standing = value >= -HAIR
        rows = slice(None) if x.device.type != "cpu" else standing.nonzero()[:, 0]
        start, labels = origin[rows], y[rows]
        nothing = torch.full_like(value[rows], torch.inf)
        nearest = Nearest(start, nothing, value[rows], grad[rows])
        if len(start):
            nearest = _attack(model, start, shape, labels, standing[rows], nearest, the_norm, plan, targeted)
    points, distance = origin.clone(), torch.zeros_like(value)
    points[rows], distance[rows] = nearest.point, nearest.distance
    return MinimumNorm(points.view_as(x), distance.isfinite(), distance)


def _attack(model, x, shape, y, standing, nearest, norm: Norm, plan: Plan, targeted: bool) -> Nearest:
    def toward(classes: Tensor | None) -> Callable:
        return lambda points: _linearize(model, points, shape, y, classes, targeted)[:2]

    at = Walk(torch.zeros_like(x), nearest.value, nearest.grad)
    nearest, at = walk(toward(None), x, standing, nearest, at, norm, plan.first, 1.0, _insist)
    if plan.walks:
        # From the nearest point found, or where there is none from where the walk stands.
        move = torch.where(nearest.distance.isfinite()[:, None], nearest.point - x, at.move)
        classes, values, grads = _look_around(model, x + move, shape, y, plan.looked_at)
        ahead = (values - (grads * move[:, None]).sum(2)).clamp_min(0)
        length = torch.stack([norm.dual(grads[:, j]) for j in range(grads.shape[1])], 1)
        distances = ahead / length.clamp_min(torch.finfo(x.dtype).tiny)
        # The class that is the nearest's own is not another.
        distances[:, 0] = torch.inf
        order = distances.argsort(1)
        for turn in range(plan.walks):
            choice = order[:, turn]
            pick = torch.arange(len(x), device=x.device)
            wins = distances[pick, choice] < COULD_WIN * nearest.distance
            if turn == 0:
                wins |= False
            found = nearest.distance.isfinite()
            stay = Walk(*(torch.where(found[:, None] if a.dim() > 1 else found, a, b) for a, b in zip((nearest.point - x, nearest.value, nearest.grad), at[:3], strict=True)))
            go = Walk(move, values[pick, choice], grads[pick, choice])
            at = Walk(*(torch.where(wins[:, None] if a.dim() > 1 else wins, a, b) for a, b in zip(go[:3], stay[:3], strict=True)))
            target = torch.where(wins, classes[pick, choice], -1)
            weight = torch.where(wins, 1.0, WARM_WEIGHT)
            nearest, at = walk(toward(target), x, standing, nearest, at, norm, plan.each, weight, _insist)
    if plan.refine:
        found = nearest.distance.isfinite()
        at = Walk(*(torch.where(found[:, None] if a.dim() > 1 else found, a, b) for a, b in zip((nearest.point - x, nearest.value, nearest.grad), at[:3], strict=True)))
        nearest, at = walk(toward(None), x, standing, nearest, at, norm, plan.refine, WARM_WEIGHT, _insist)
    return nearest


def _insist(step, left, found):
    return OVERSHOOT * torch.where(found, left, 3)


def _linearize(model, points, shape, y, classes, targeted):
    points = points.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(points.view(-1, *shape))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        value = -logit_margin(logits, y) if targeted else logit_margin(logits, y)
        if classes is not None:
            toward = (logits.gather(1, y[:, None]) - logits.gather(1, classes.clamp_min(0)[:, None]))[:, 0]
            value = torch.where(classes < 0, value, toward)
        value = value + HAIR
        (grad,) = torch.autograd.grad(value.sum(), points)
    return value.detach(), grad.flatten(1), logits.detach()


def _look_around(model, points, shape, y, number):
    points = points.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(points.view(-1, *shape))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        others = logits.detach().scatter(1, y[:, None], -torch.inf)
        classes = others.topk(number, 1).indices
        values = logits.gather(1, y[:, None]) - logits.gather(1, classes) + HAIR
        grads = [torch.autograd.grad(values[:, j].sum(), points, retain_graph=True)[0] for j in range(number)]
    return classes, values.detach(), torch.stack(grads, 1).flatten(2)
