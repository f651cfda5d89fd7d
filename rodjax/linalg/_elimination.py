"""Eliminations of a few dimensions, without library calls, so that XLA fuses them.

A LAPACK call for every stage of every step made a whole flow 15 times slower on busy
CPU cores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def inverse(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Of a definite matrix, which needs no pivots, by Gauss-Jordan."""
    index = jnp.arange(len(matrix))

    def eliminate(c, m):
        here = index == c
        row = jnp.where(here, 1, m[c]) / m[c, c]
        rest = jnp.where(here[None], 0, m) - m[:, c][:, None] * row[None]
        return jnp.where(here[:, None], row[None], rest)

    return jax.lax.fori_loop(0, len(matrix), eliminate, matrix)


def is_positive(matrix: Float[Array, "*batch k k"]) -> Bool[Array, "*batch"]:
    """Whether symmetric matrices are positive definite: whether all pivots are."""
    k = matrix.shape[-1]
    entry = {(i, j): matrix[..., i, j] for i in range(k) for j in range(i + 1)}
    positive = entry[0, 0] > 0
    for c in range(k - 1):
        for i in range(c + 1, k):
            factor = entry[i, c] / entry[c, c]
            for j in range(c + 1, i + 1):
                entry[i, j] = entry[i, j] - factor * entry[j, c]
        positive = positive & (entry[c + 1, c + 1] > 0)
    return positive


def root(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """A lower-triangular C with C C^T = `matrix`, positive semidefinite."""
    tiny = jnp.finfo(matrix.dtype).tiny
    floor = jnp.finfo(matrix.dtype).eps * jnp.maximum(jnp.trace(matrix), 0.0)
    floor = jnp.maximum(floor, tiny)
    columns = []
    for i in range(len(matrix)):
        # What rounding leaves of an exhausted direction is no direction.
        left = matrix[i, i] > floor
        pivot = jnp.where(left, matrix[i, i], 1.0)
        column = jnp.where(left, matrix[:, i] * jax.lax.rsqrt(pivot), 0.0)
        columns.append(column)
        matrix = matrix - jnp.outer(column, column)
    return jnp.stack(columns, 1)
