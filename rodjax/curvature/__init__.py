"""Derivatives of a loss beyond its gradient.

Knows: products with the Hessian and the third derivative, the Hessian's largest
eigenvalues, and those of the preconditioned Hessian over the optimizer's thresholds.
Must not know: flows, trajectories, what is recorded.
"""

from rodjax.curvature._derivatives import hvp, third_derivative
from rodjax.curvature._eigenpairs import (
    hessian_eigenpairs,
    preconditioned_eigenpairs,
    sharpness,
    sharpness_ratio,
    starting_direction,
    starting_directions,
)

__all__ = [
    "hessian_eigenpairs",
    "hvp",
    "preconditioned_eigenpairs",
    "sharpness",
    "sharpness_ratio",
    "starting_direction",
    "starting_directions",
    "third_derivative",
]
