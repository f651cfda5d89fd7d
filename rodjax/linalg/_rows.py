"""A few vectors that are pytrees, on a leading axis of every leaf.

Inner products are sums over leaves and vectors are combined leaf by leaf, so that no
leaf changes its shape: parameters that are sharded over devices stay where they are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from rodjax.linalg._trees import norm

# Roundoffs that nothing is to be made of.
ROUNDING = 8


def gram(a: PyTree, b: PyTree) -> Float[Array, "k m"]:
    """The inner products of k vectors with m others."""

    def part(x: Array, y: Array) -> Array:
        if len(x) == len(y) == 1:
            # What the compiler needs no copy for.
            return jnp.sum(x * y).reshape(1, 1)
        inner = tuple(range(1, x.ndim))
        # An accelerator's default precision would not keep a basis orthonormal.
        return jnp.tensordot(x, y, (inner, inner), precision="highest")

    parts = jax.tree.leaves(jax.tree.map(part, a, b))
    return jnp.sum(jnp.stack(parts), 0)


def combine(weights: Float[Array, "k m"], rows: PyTree) -> PyTree:
    """k combinations of m vectors."""
    if weights.shape == (1, 1):
        # Which the compiler puts together with others, in the place of one in memory.
        return weigh(weights[0], rows)
    return jax.tree.map(
        lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1, precision="highest"),
        rows,
    )


def weigh(weights: Float[Array, " k"], rows: PyTree) -> PyTree:
    """Each of k vectors times a number of its own."""
    return jax.tree.map(lambda x: column(weights, x) * x, rows)


def column(numbers: Array, x: Array) -> Array:
    """k numbers in the shape in which each meets its own entry of a leaf [k, ...]."""
    return numbers.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def lengths(rows: PyTree) -> Float[Array, " k"]:
    """Their Euclidean norms."""
    return jax.vmap(norm)(rows)


def without(rows: PyTree, basis: PyTree) -> PyTree:
    """Without their parts along an orthonormal basis."""
    along = combine(gram(rows, basis), basis)
    return jax.tree.map(jnp.subtract, rows, along)


def basis_of(
    rows: PyTree, others: Sequence[PyTree], fill: PyTree | None = None
) -> tuple[PyTree, Bool[Array, " k"]]:
    """A basis of what k vectors span, across `others`, orthonormal ones or zero.

    And which of the k there are: those that rounding leaves nothing of are zero, or if
    given made of `fill`. By the eigenvectors of their inner products, twice
    (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002).
    """
    there = jnp.ones(len(jax.tree.leaves(rows)[0]), bool)
    for turn in range(2 if fill is None else 3):
        for other in others:
            rows = without(rows, other)
        inner = gram(rows, rows)
        size = jnp.diag(inner)
        scale = jax.lax.rsqrt(jnp.where(size > 0, size, 1))
        values, vectors = symmetric(inner * scale[:, None] * scale[None])
        least = (ROUNDING * float(jnp.finfo(inner.dtype).eps)) ** 2
        there = values > least
        shrink = jnp.where(there, jax.lax.rsqrt(jnp.where(there, values, 1)), 0)
        rows = combine((vectors * shrink[None] * scale[:, None]).T, rows)
        if fill is not None and turn == 0:
            add = lambda x, y, there=there: jnp.where(column(there, x) > 0, x, y)
            rows = jax.tree.map(add, rows, fill)
    return rows, there


def symmetric(matrix: Float[Array, "m m"]) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors as columns."""
    if len(matrix) == 1:
        return matrix[0], jnp.ones_like(matrix)
    return tuple(jnp.linalg.eigh(matrix))


def inverse_root(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The inverse square root of a positive definite matrix."""
    values, vectors = symmetric(matrix)
    return vectors * jax.lax.rsqrt(values)[None] @ vectors.T
