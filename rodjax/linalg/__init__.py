"""Linear algebra that knows no loss and no optimizer.

Knows: the largest eigenvalues of symmetric operators on pytrees, the semidefinite
complementarity problem, covariances of low rank as a few rows, and eliminations of a
few dimensions that a vector field can afford. Must not know: where an operator comes
from.
"""

from rodjax.linalg._complementarity import Complementary, complementarity
from rodjax.linalg._eigen import Eigenpair, Eigenpairs, top_eigenpair, top_eigenpairs
from rodjax.linalg._elimination import root
from rodjax.linalg._length import length, square_root
from rodjax.linalg._lowrank import (
    cubature,
    flatten,
    orthonormal,
    tangent,
    unflatten,
)
from rodjax.linalg._refine import dot, refined_eigenpair, unit

__all__ = [
    "Complementary",
    "Eigenpair",
    "Eigenpairs",
    "complementarity",
    "cubature",
    "dot",
    "flatten",
    "length",
    "orthonormal",
    "refined_eigenpair",
    "root",
    "square_root",
    "tangent",
    "top_eigenpair",
    "top_eigenpairs",
    "unflatten",
    "unit",
]
