"""The method of Dynamics-Aware Robust Training (Xu et al., 2023), for anyone's models and training loops.

Boundary points and margins, the gradient of a margin, the losses, the speed of the boundary along an update, PGD, and
the average of the weights. It needs torch and numpy, knows no flag, file or dataset, and `pip install .` installs it
alone. What is listed here is what others may rely on; the rest of its modules is for this repository.
"""

from dyart.attacks import pgd
from dyart.averaging import WeightAverage
from dyart.dynamics import boundary_speed, update_direction
from dyart.losses import dyart_loss
from dyart.margin import (
    Boundary,
    approach_boundary,
    find_boundary,
    is_locally_closest,
    logit_margin,
    margin_gradient_weights,
    soft_logit_margin,
)
from dyart.minimum_norm import MinimumNorm, closest_boundary, minimum_norm_attack

# The only place where the version is written: pyproject.toml reads it from here.
__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "MinimumNorm",
    "WeightAverage",
    "__version__",
    "approach_boundary",
    "boundary_speed",
    "closest_boundary",
    "dyart_loss",
    "find_boundary",
    "is_locally_closest",
    "logit_margin",
    "margin_gradient_weights",
    "minimum_norm_attack",
    "pgd",
    "soft_logit_margin",
    "update_direction",
]
