"""The minimum-norm attack as AttackBench (Cinà et al., 2025) wants an attack: its configurations and their getter.

What the getter returns goes into `attackbench.run_attack` of attackbenchlib 2.0.2 as it is. This module is also one
that its registry can list beside those of other libraries, by `_prefix`, `_wrapper` and the names of these functions:
docs/extending.md says how.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from dyart.minimum_norm import minimum_norm_attack

NORMS = {"linf": "Linf", "l2": "L2"}
_prefix = "dyart"


def dyart_minimum_norm() -> dict[str, Any]:
    """The configuration for l_inf."""
    return {"name": "minimum_norm", "source": "dyart", "threat_model": "linf", "passes": 100}


def dyart_minimum_norm_l2() -> dict[str, Any]:
    """The configuration for l2."""
    return dyart_minimum_norm() | {"threat_model": "l2"}


def get_dyart_minimum_norm(threat_model: str, passes: int) -> Callable[..., Tensor]:
    """The attack of a configuration, (model, inputs, labels, targets, targeted) to adversarial inputs in [0, 1].

    threat_model: "linf" or "l2". Raises ValueError for another. passes: as for `minimum_norm_attack`; of AttackBench's
    2,000 forward and backward passes 1,000 are within the budget.
    """
    if threat_model not in NORMS:
        raise ValueError(f"threat_model must be linf or l2, got {threat_model}")
    return partial(_attack, threat_model=threat_model, passes=passes)


def _attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    targeted: bool = False,
    *,
    threat_model: str,
    passes: int,
) -> Tensor:
    goal = targets if targeted else labels
    return minimum_norm_attack(model, inputs, goal, norm=NORMS[threat_model], passes=passes, targeted=targeted).x


def _wrapper(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    attack: Callable[..., Tensor],
    targets: Tensor | None = None,
    targeted: bool = False,
) -> Tensor:
    return attack(model, inputs, labels, targets, targeted)
