"""A covariance of low rank, as a few rows: what several flows carry along."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rodjax.linalg._elimination import inverse
from rodjax.linalg._length import square_root
from rodjax.linalg._rows import combine, gram, weigh
from rodjax.linalg._trees import dot

# Least ridge on the rows' Gram matrix: more of it and a spare row cannot grow.
RIDGE = 1e-8


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


def tangent(steps: PyTree, rows: PyTree) -> PyTree:
    """dU/dt such that U^T U keeps its rank and follows dSigma/dt as nearly as it can.

    For dSigma/dt = V^T V - 2 Sigma, V = `steps` and U = `rows`, pytrees on a leading
    axis, by projection onto the tangent space of matrices of rank r.
    """
    # Scaled to unit length, a tiny row is as well determined as a long one.
    length = square_root(jax.vmap(dot)(rows, rows))
    length = jnp.maximum(length, float(jnp.finfo(length.dtype).tiny))
    unit = weigh(1 / length, rows)
    ridge = max(RIDGE, 8.0 * float(jnp.finfo(length.dtype).eps))
    inner = gram(unit, unit) + ridge * jnp.eye(len(length), dtype=length.dtype)
    inverted = inverse(inner)
    # C^-1 U V^T V, still scaled.
    push = weigh(1 / length, combine(inverted @ gram(unit, steps), steps))
    inside = combine((inverted @ gram(unit, push)).T, unit)
    return jax.tree.map(lambda p, i, u: p - 0.5 * i - u, push, inside, rows)


def orthonormal(rows: PyTree, weight: PyTree) -> PyTree:
    """The rows, each without the ones before it, with u_i . weight u_j = (i == j).

    Of pytrees on a leading axis, and a `weight` like one of them. By modified
    Gram-Schmidt, unrolled: the rows are few and nearly orthonormal.
    """
    times = lambda x: jax.tree.map(jnp.multiply, weight, x)
    done: list[PyTree] = []
    for i in range(len(jax.tree.leaves(rows)[0])):
        rest = jax.tree.map(lambda x, i=i: x[i], rows)
        for other in done:
            part = dot(times(other), rest)
            rest = jax.tree.map(lambda x, y, by=part: x - by * y, rest, other)
        square = dot(rest, times(rest))
        square = jnp.maximum(square, float(jnp.finfo(square.dtype).tiny))
        root = jax.lax.rsqrt(square)
        done.append(jax.tree.map(lambda x, by=root: by * x, rest))
    return jax.tree.map(lambda *x: jnp.stack(x), *done)
