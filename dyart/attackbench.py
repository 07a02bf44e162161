"""The minimum-norm attack as AttackBench (Cinà et al., 2025) wants an attack: a named configuration and its getter.

AttackBench calls what the getter returns with a model that counts its own passes and remembers the best example of a
batch that it has been shown, (model, inputs, labels, targets, targeted), and takes adversarial inputs in [0, 1] back.
docs/extending.md says where the two are entered there.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dyart.minimum_norm import minimum_norm_attack

NORMS = {float("inf"): "Linf", 2.0: "L2"}


def dyart_minimum_norm() -> None:
    """The configuration: Sacred reads a function's local names as the options of an attack."""
    name = "minimum_norm"  # noqa: F841
    source = "dyart"  # noqa: F841
    threat_model = "linf"  # noqa: F841
    norm = float("inf")  # noqa: F841
    passes = 100  # noqa: F841


def get_dyart_minimum_norm(norm: float, passes: int) -> Callable[..., Tensor]:
    """The attack of a configuration; `norm` is inf or 2. Raises ValueError for another."""
    if float(norm) not in NORMS:
        raise ValueError(f"norm must be inf or 2, got {norm}")
    return partial(_attack, norm=NORMS[float(norm)], passes=passes)


def _attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    targeted: bool = False,
    *,
    norm: str,
    passes: int,
) -> Tensor:
    goal = targets if targeted else labels
    return minimum_norm_attack(model, inputs, goal, norm=norm, passes=passes, targeted=targeted).x
