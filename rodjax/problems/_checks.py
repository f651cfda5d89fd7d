"""What the problems' arguments must be; errors name the argument."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is a whole number."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_counts(**sizes: Iterable[object]) -> None:
    """Raise `ValueError` for sizes that are not positive whole numbers."""
    for name, values in sizes.items():
        for value in values:
            if not (is_count(value) and value > 0):
                raise ValueError(f"{name}={value} must be a positive whole number.")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` for what is not positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be positive and finite.")


def check_finite(name: str, values: Sequence[float]) -> None:
    """Raise `ValueError` unless all are finite."""
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name}={tuple(values)} must be finite.")


def check_numbers(name: str, values: Sequence[float], count: int) -> None:
    """Raise `ValueError` for what is not so many finite numbers."""
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers: give it {count}.")
    check_finite(name, values)


def vector(
    name: str, values: Sequence[float] | ArrayLike, dtype: jnp.dtype
) -> Float[Array, " d"]:
    """The values as a vector. Raises `ValueError` if it is empty or not finite."""
    found = jnp.asarray(values, dtype)
    if found.ndim != 1 or found.size == 0:
        raise ValueError(
            f"{name} has shape {found.shape}: give a non-empty list of numbers."
        )
    if not bool(jnp.isfinite(found).all()):
        raise ValueError(f"{name} has entries that are not finite: remove them.")
    return found
