"""Small training problems with known answers, and one real one (digits)."""

from rodjax.problems.base import Problem, float_dtype
from rodjax.problems.digits import digits, digits_mlp
from rodjax.problems.landscapes import banana, cosine
from rodjax.problems.toys import (
    berthier,
    factorization,
    quadratic,
    quartic_well,
    scalar_factorization,
)

__all__ = [
    "Problem",
    "banana",
    "berthier",
    "cosine",
    "digits",
    "digits_mlp",
    "factorization",
    "float_dtype",
    "quadratic",
    "quartic_well",
    "scalar_factorization",
]
