"""Training problems: toys with known answers, networks, and the data they fit.

Knows: losses, parameters to start from, data sets, small networks in Flax, which is
loaded when one of them is first asked for. Must not know: how a problem is optimized or
reported; nothing but the command line imports it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rodjax.problems._base import Data, Problem, float_dtype
from rodjax.problems._berthier import berthier, berthier_circle, berthier_matrix
from rodjax.problems._chunked import chunked_mean
from rodjax.problems._cifar10 import cifar10
from rodjax.problems._digits import digits
from rodjax.problems._landscapes import banana, cosine
from rodjax.problems._mnist1d import mnist1d
from rodjax.problems._synthetic import clusters
from rodjax.problems._toys import (
    factorization,
    quadratic,
    quartic_well,
    scalar_factorization,
)

if TYPE_CHECKING:
    from rodjax.problems._networks import cnn, digits_mlp, mlp
    from rodjax.problems._sorting import sequences, sorting
    from rodjax.problems._supervised import supervised
    from rodjax.problems._vision_transformer import vit

# What needs Flax, whose import takes longer than all others together.
_NETWORKS = {
    "cnn": "_networks",
    "digits_mlp": "_networks",
    "mlp": "_networks",
    "sequences": "_sorting",
    "sorting": "_sorting",
    "supervised": "_supervised",
    "vit": "_vision_transformer",
}

__all__ = [
    "Data",
    "Problem",
    "banana",
    "berthier",
    "berthier_circle",
    "berthier_matrix",
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
    "mnist1d",
    "quadratic",
    "quartic_well",
    "scalar_factorization",
    "sequences",
    "sorting",
    "supervised",
    "vit",
]


def __getattr__(name: str) -> Any:
    if name not in _NETWORKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NETWORKS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
