"""The method of Dynamics-Aware Robust Training (Xu et al., 2023), for anyone's models and training loops.

A model is any nn.Module that maps pixels in [0, 1], of shape (n, ...), to logits (n, C); labels are (n,) int64; lengths
are in units of pixels in [0, 1]. All functions but the losses leave the model as it was.

    margins    find_boundary            the closest points of the decision boundary, a Boundary
               approach_boundary        rougher ones, in one pass, to train on
               is_locally_closest       which of them nearly satisfy the conditions of a closest point
               logit_margin             φ = z_y − max z_k, of logits
               soft_logit_margin        Φ_β, the smooth one on its safe side
    training   dyart_loss               the loss of a batch, and what there is to log
               margin_gradient_weights  1 / ‖∇_x Φ‖, for a loss of margins of your own
               WeightAverage            the average of the weights, which is what is evaluated
               pgd                      the attack of baselines and validation
    dynamics   update_direction         where a loss, or its optimizer's step, moves the parameters
               boundary_speed           by how much the margins change along a direction
    attack     minimum_norm_attack      the smallest change that changes the decision, a MinimumNorm
               closest_boundary         its points as a Boundary: margins to the nearest of several classes
    norms      NORMS, Norm              Linf, L2, and what you add

    from dyart import find_boundary

    boundary = find_boundary(model, x, labels)
    print(255 * boundary.margin[boundary.found].median())

The package needs torch and numpy, knows no flag, file or dataset, and `pip install .` installs it alone. What is listed
here is what others may rely on; the rest of its modules is for this repository. Worked examples: docs/extending.md.
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
from dyart.projection import NORMS, Norm

# The only place where the version is written: pyproject.toml reads it from here.
__version__ = "0.1.0"

__all__ = [
    "NORMS",
    "Boundary",
    "MinimumNorm",
    "Norm",
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
