"""Training problems: toys with known answers, networks, and the data they fit."""

from rodjax.problems.base import Data, Problem, float_dtype
from rodjax.problems.cifar10 import cifar10
from rodjax.problems.digits import digits, digits_mlp
from rodjax.problems.landscapes import banana, cosine
from rodjax.problems.networks import cnn, mlp
from rodjax.problems.sorting import sequences, sorting
from rodjax.problems.supervised import chunked_mean, supervised
from rodjax.problems.synthetic import clusters
from rodjax.problems.toys import (
    berthier,
    factorization,
    quadratic,
    quartic_well,
    scalar_factorization,
)
from rodjax.problems.vision_transformer import vit

__all__ = [
    "Data",
    "Problem",
    "banana",
    "berthier",
    "chunked_mean",
    "cifar10",
    "clusters",
    "cnn",
    "cosine",
    "digits",
    "digits_mlp",
    "factorization",
    "float_dtype",
    "mlp",
    "quadratic",
    "quartic_well",
    "scalar_factorization",
    "sequences",
    "sorting",
    "supervised",
    "vit",
]
