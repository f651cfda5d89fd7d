"""Sums over pytrees whose leaves may be in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rodjax import linalg


def wide(tree: PyTree) -> PyTree:
    """In single precision at least."""
    least = lambda x: np.promote_types(jnp.result_type(x), np.float32)
    return jax.tree.map(lambda x: jnp.asarray(x, least(x)), tree)


def like(tree: PyTree, other: PyTree) -> PyTree:
    """In the dtypes of another tree."""
    return jax.tree.map(lambda x, y: jnp.astype(x, jnp.result_type(y)), tree, other)


def along(a: PyTree, b: PyTree, dtype: jnp.dtype) -> Float[Array, ""]:
    """The inner product."""
    return linalg.dot(wide(a), wide(b)).astype(dtype)


def over(a: Array, b: Array) -> Float[Array, "2"]:
    """[1, a / b], or [0, 0] where that does not exist."""
    there = b != 0
    found = jnp.where(there, a / jnp.where(there, b, 1), 0)
    return jnp.stack([there.astype(found.dtype), found])
