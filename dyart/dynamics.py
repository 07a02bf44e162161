"""How a training step moves the decision boundary: update directions, and the speed of the boundary along them.

The speed s at a point x is the change of its margin, dR/dt, while the parameters move as θ'(t). Where s < 0 the
boundary comes closer: the step makes x more vulnerable (Xu et al., 2023, section 3).
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim import Optimizer

from dyart.losses import LOSSES
from dyart.margin import MAX_GRADIENT_WEIGHT, Boundary, find_boundary, margin_gradient_weights, soft_logit_margin
from dyart.modes import frozen
from dyart.projection import lookup_norm

# θ': a tensor for each parameter, by its name.
Direction = dict[str, Tensor]


def update_direction(
    method: str,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    optimizer: Optimizer | None = None,
    clip_grad: float | None = None,
    **options: Any,
) -> Direction:
    """The direction θ' in which a training method moves the parameters, from where they are and on the given data.

    Without an optimizer it is minus the gradient of the method's loss; with one, the step that this optimizer would
    take next: momentum, weight decay and clipping included. The loss is taken as in training, with the statistics of
    each batch in BatchNorm. Model and optimizer are left as they were, running statistics and gradients included.

    Parameters
    ----------
    method : str
        A name in `dyart.losses.LOSSES`: clean, dyart, at, trades, mart, n-fgsm, fgsm-rs.
    model : nn.Module
        Maps (n, ...) to logits (n, C).
    batches : iterable of (x (n, ...), y (n,))
        Pixels in [0, 1] and labels. The gradient is the mean over all of their examples; a list with one batch gives
        the step of training on that batch.
    optimizer : Optimizer, optional
        The one that trains `model`.
    clip_grad : float, optional
        The largest 2-norm that the optimizer gets the gradient with.
    options
        Arguments of the method's loss. A `generator` that is not given is one with seed 0, so that methods start their
        attacks alike and the global random state is left alone.

    Returns
    -------
    dict of str to Tensor
        θ' by the names of `model.named_parameters()`; 0 for those that do not require a gradient.

    Raises
    ------
    ValueError
        For an unknown method, no examples, and as the loss does.
    """
    if method not in LOSSES:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(LOSSES)}")
    # Copied as one object, the optimizer's copy holds the parameters of the model's copy.
    model, optimizer = copy.deepcopy((model, optimizer))
    parameters = dict(model.named_parameters())
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    if method != "clean":
        device = next(model.parameters()).device
        options = {"generator": torch.Generator(device).manual_seed(0)} | options

    model.zero_grad()
    examples = 0
    for x, y in batches:
        loss, _ = LOSSES[method](model, x, y, **options)
        (loss * len(y)).backward()
        examples += len(y)
    if not examples:
        raise ValueError("no examples to take an update direction on")
    for parameter in trained:
        if parameter.grad is not None:
            parameter.grad /= examples
    if clip_grad is not None:
        nn.utils.clip_grad_norm_(trained, clip_grad)

    if optimizer is None:
        return {
            name: torch.zeros_like(p) if p.grad is None else -p.grad  # A copy's own: nobody else holds it.
            for name, p in parameters.items()
        }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in parameters.items()}


def unit_direction(direction: Direction) -> Direction:
    """`direction` scaled to Euclidean norm 1 over all parameters, so that methods compare; 0 stays 0."""
    length = torch.stack([torch.linalg.vector_norm(value) for value in direction.values()]).norm()
    return {name: value / length.clamp_min(torch.finfo(length.dtype).tiny) for name, value in direction.items()}


def boundary_speed(
    model: nn.Module,
    boundary: Boundary,
    labels: Tensor,
    direction: Mapping[str, Tensor],
    *,
    norm: str = "Linf",
    temperature: float = 5.0,
    x: Tensor | None = None,
) -> Tensor:
    """The speed s = dR/dt = ⟨∇_θ Φ(x̂), θ'⟩ / ‖∇_x Φ(x̂)‖_q of the boundary at n boundary points, in one pass.

    ⟨∇_θ Φ(x̂), θ'⟩ is the derivative of Φ(x̂; θ) along θ', by forward-mode differentiation for all points at once. It is
    that of the model in eval mode: BatchNorm's running statistics are held, since θ' moves parameters only.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to logits (n, C).
    boundary : Boundary
        From `find_boundary` with the same norm and temperature.
    labels : Tensor (n,), int64
    direction : mapping of str to Tensor
        θ' by parameter name, from `update_direction`.
    norm, temperature
        As in `find_boundary`; temperature inf is the exact boundary.
    x : Tensor (n, ...), optional
        The examples. With them the dual norm is taken over the coordinates that the box leaves free, which makes the
        speed exact also where the closest point lies on the face of the box. The paper's formula leaves the box out:
        its speeds have the right sign, and are too small where pixels saturate.

    Returns
    -------
    Tensor (n,)
        In pixels of [0, 1] per unit of θ'; positive where the boundary moves away; nan where no point was found.

    Raises
    ------
    ValueError
        For an unknown norm, and a direction that does not name every parameter.

    Source: Xu et al., 2023, section 3 (equation of the boundary speed).
    """
    weights = margin_gradient_weights(boundary, norm) if x is None else _weights_in_box(x, boundary, norm)
    with frozen(model):
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        if parameters.keys() != direction.keys():
            differing = ", ".join(sorted(parameters.keys() ^ direction.keys())[:3])
            raise ValueError(f"the direction does not name the model's parameters: they differ in {differing}")

        def values(at: Direction) -> Tensor:
            return soft_logit_margin(functional_call(model, at, (boundary.x,)), labels, temperature)

        _, change = jvp(values, (parameters,), ({name: direction[name] for name in parameters},))
    return torch.where(boundary.found, change * weights, math.nan)


def _weights_in_box(x: Tensor, boundary: Boundary, norm: str) -> Tensor:
    """μ of the KKT conditions ∇‖δ‖ + μ ∇_x Φ = 0 on the coordinates that the box does not stop. (n,)

    The move δ is the exact one onto the hyperplane that touches the boundary at x̂, since a search ends only near it.
    Coordinates that reach the box cannot make up for a change of Φ, the others can.
    """
    origin, grad = x.flatten(1), boundary.grad.flatten(1)
    gain = (grad * (boundary.x.flatten(1) - origin)).sum(1)
    the_norm = lookup_norm(norm)
    move = the_norm.project(origin, grad, gain)
    free = move.abs() < (1 - 1e-6) * torch.where(move > 0, 1 - origin, origin)
    weights = the_norm.dual(grad * free).reciprocal()
    if norm == "L2":
        weights = weights * the_norm.length(move * free) / the_norm.length(move)
    return torch.where(boundary.found, weights, 0).clamp_max(MAX_GRADIENT_WEIGHT)


def refined_margin(x: Tensor, boundary: Boundary, norm: str = "Linf") -> Tensor:
    """Margins of boundary points moved onto Φ = 0 to first order: R + Φ(x̂) / ‖∇_x Φ(x̂)‖_q. (n,)

    A search ends a little beyond the boundary, by an amount that jumps when the parameters move; here it cancels.
    """
    return boundary.margin + boundary.value * _weights_in_box(x, boundary, norm)


def negative_speed_share(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    method: str,
    *,
    below: float = 8 / 255,
    norm: str = "Linf",
    temperature: float = math.inf,
    search_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> float:
    """Of the vulnerable examples of a batch, the share that one step of `method` on that batch brings nearer still.

    Parameters
    ----------
    model, x, y
        As in `update_direction`; the step is on all of the batch.
    below : float
        Vulnerable are the correctly classified examples with a margin below this, in pixels of [0, 1].
    norm, temperature
        The boundary; temperature inf is the exact one.
    search_steps : int, optional
        Iterations of the "fast" search for boundary points; by default those of `find_boundary`.
    method, options
        The loss whose gradient is stepped along, and its arguments; see `update_direction`.

    Returns
    -------
    float
        In [0, 1]; nan where no example is vulnerable.
    """
    direction = update_direction(method, model, [(x, y)], **(options or {}))
    shown = {"below": below, "norm": norm, "temperature": temperature, "search_steps": search_steps}
    negative = negative_speeds(model, x, y, direction, **shown)
    return negative[~negative.isnan()].double().mean().item()


def negative_speeds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    direction: Mapping[str, Tensor],
    *,
    below: float = 8 / 255,
    norm: str = "Linf",
    temperature: float = math.inf,
    search_steps: int | None = None,
) -> Tensor:
    """Of each vulnerable example, whether `direction` brings its boundary nearer: 1 or 0; nan for the others. (n,)

    The arguments are those of `negative_speed_share`, which is the mean of these for the step of a method.
    """
    boundary = find_boundary(model, x, y, norm=norm, temperature=temperature, steps=search_steps)
    speed = boundary_speed(model, boundary, y, direction, norm=norm, temperature=temperature)
    return torch.where(boundary.found & (boundary.margin < below), (speed < 0).float(), math.nan)
