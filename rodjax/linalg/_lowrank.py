"""A covariance of low rank, as a few rows: what several flows carry along."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from rodjax.linalg._elimination import inverse
from rodjax.linalg._length import square_root

# Least ridge on the rows' Gram matrix: more of it and a spare row cannot grow.
RIDGE = 1e-8


def flatten(stacked: PyTree) -> Float[Array, "k d"]:
    """Pytrees stacked on a leading axis, each as one row."""
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(stacked)


def unflatten(rows: Float[Array, "k d"], like: PyTree) -> PyTree:
    """The inverse of `flatten`, structured as the stacked `like`."""
    return jax.vmap(ravel_pytree(jax.tree.map(lambda x: x[0], like))[1])(rows)


def cubature(centre: PyTree, rows: PyTree) -> PyTree:
    """Points whose mean is `centre` and whose covariance is rows^T rows.

    With r rows (pytrees on a leading axis) the 2 r points centre ± sqrt(r) row.
    """
    reach = jax.tree.leaves(rows)[0].shape[0] ** 0.5
    return jax.tree.map(
        lambda z, u: jnp.concatenate([z[None] + reach * u, z[None] - reach * u]),
        centre,
        rows,
    )


def tangent(
    steps: Float[Array, "k d"], rows: Float[Array, "r d"]
) -> Float[Array, "r d"]:
    """dU/dt such that U^T U keeps its rank and follows dSigma/dt as nearly as it can.

    For dSigma/dt = V^T V - 2 Sigma, V = `steps` and U = `rows`, by projection onto the
    tangent space of matrices of rank r.
    """
    # Scaled to unit length, a tiny row is as well determined as a long one.
    length = square_root(jnp.sum(rows * rows, axis=1, keepdims=True))
    length = jnp.maximum(length, jnp.finfo(rows.dtype).tiny)
    unit = rows / length
    ridge = max(RIDGE, 8.0 * float(jnp.finfo(rows.dtype).eps))
    gram = unit @ unit.T + ridge * jnp.eye(len(rows), dtype=rows.dtype)
    inverted = inverse(gram)
    # C^-1 U V^T V, still scaled.
    push = inverted @ ((unit @ steps.T) @ steps) / length
    inside = (inverted @ (unit @ push.T)).T @ unit
    return push - 0.5 * inside - rows


def orthonormal(
    rows: Float[Array, "k d"], weight: Float[Array, " d"]
) -> Float[Array, "k d"]:
    """The rows, each without the ones before it, with u_i . weight u_j = (i == j).

    By modified Gram-Schmidt, unrolled: the rows are few and nearly orthonormal.
    """
    done: list[Array] = []
    for row in rows:
        rest = row
        for other in done:
            rest = rest - ((other * weight) @ rest) * other
        size = jnp.maximum(rest @ (weight * rest), jnp.finfo(rows.dtype).tiny)
        done.append(rest * jax.lax.rsqrt(size))
    return jnp.stack(done)
