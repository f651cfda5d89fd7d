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
from rodjax.linalg._lowrank import cubature, orthonormal, tangent
from rodjax.linalg._refine import refined_eigenpair
from rodjax.linalg._rows import combine, gram
from rodjax.linalg._trees import (
    alike,
    dot,
    random_direction,
    rows_like,
    scattered,
    unit,
)

__all__ = [
    "Complementary",
    "Eigenpair",
    "Eigenpairs",
    "alike",
    "combine",
    "complementarity",
    "cubature",
    "dot",
    "gram",
    "length",
    "orthonormal",
    "random_direction",
    "refined_eigenpair",
    "root",
    "rows_like",
    "scattered",
    "square_root",
    "tangent",
    "top_eigenpair",
    "top_eigenpairs",
    "unit",
]
