"""Restarted block Lanczos: the largest eigenvalues of a symmetric operator.

`jax.experimental.sparse.linalg.lobpcg_standard` spends four times the products, never
stops on negative eigenvalues and returns NaN for zero ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Operator = Callable[[Float[Array, " n"]], Float[Array, " n"]]

# Up to this many parameters the matrix is formed and diagonalized directly.
DENSE = 32
# Block products of one Lanczos sweep of one vector and of several, sweeps at most.
KRYLOV = 12
BLOCK_KRYLOV = 6
SWEEPS = 30
# Ritz vectors kept beyond twice those wanted: with fewer the last converge slowly.
BUFFER = 3


class Pairs(NamedTuple):
    """`Eigenpairs` with their vectors as rows."""

    values: Float[Array, " k"]
    rows: Float[Array, "k n"]
    residuals: Float[Array, " k"]
    sweeps: Int[Array, ""]


class _Krylov(NamedTuple):
    """Between two sweeps: A kept_i = ritz_i kept_i + a combination of `block`."""

    kept: Float[Array, "p n"]
    ritz: Float[Array, " p"]
    block: Float[Array, "k n"]
    unfinished: Array
    sweeps: Int[Array, ""]


def lanczos(operator: Operator, start: Float[Array, "k n"], accuracy: float) -> Pairs:
    """The k largest eigenvalues of `operator`, found from k vectors to start from.

    Sweeps until all residuals are below `accuracy` or at the level of rounding.
    """
    apply = jax.vmap(operator)
    (k, n), dtype = start.shape, start.dtype
    steps = KRYLOV if k == 1 else BLOCK_KRYLOV
    p = 2 * k + BUFFER
    m = p + steps * k
    if n <= max(DENSE, 2 * m):
        matrix = apply(jnp.eye(n, dtype=dtype))
        rows = jnp.linalg.eigh(matrix)[1][:, ::-1][:, :k].T
        return _measured(rows, dot(rows, matrix), jnp.zeros((), jnp.int32))

    eps = float(jnp.finfo(dtype).eps)
    noise = jax.random.normal(jax.random.key(0), (k, n), dtype) / n**0.5

    def expand(carry, step):
        basis, sweeps = carry
        images = apply(jax.lax.dynamic_slice_in_dim(basis, p + step * k, k))
        inside, rest = split(images, basis)
        # Where a Krylov space ends it goes on at random: noise at the rounding level.
        size = jnp.max(_norm(images))
        level = jnp.where(size > 0, 8 * eps * size, 1)
        rest += level * jnp.roll(noise, sweeps * steps + step + 1, axis=1)
        rest, outer = _orthonormal(rest)
        rest, inner = _orthonormal(split(rest, basis)[1])
        basis = jax.lax.dynamic_update_slice_in_dim(basis, rest, p + (step + 1) * k, 0)
        return (basis, sweeps), (inside, jnp.where(size > 0, dot(outer, inner), 0))

    def sweep(now):
        basis = jnp.zeros((m + k, n), dtype).at[:p].set(now.kept)
        basis = basis.at[p : p + k].set(now.block)
        (basis, _), (inside, outside) = jax.lax.scan(
            expand, (basis, now.sweeps), jnp.arange(steps)
        )
        # The part of the projected operator on and above the diagonal.
        inside = jnp.moveaxis(inside, 0, 1).reshape(m + k, -1)
        upper = jnp.zeros((m, m), dtype).at[:, p:].set(inside[:m])
        norm = _norm(upper.reshape(-1))
        # Rows that the first sweep leaves empty are to sort below any Ritz value.
        low = jnp.where(norm > 0, -2 * norm, -1)
        upper = upper.at[jnp.arange(p), jnp.arange(p)].set(
            jnp.where(now.sweeps > 0, now.ritz, low)
        )
        ritz, turn = jnp.linalg.eigh(jnp.triu(upper) + jnp.triu(upper, 1).T)
        ritz, turn = ritz[::-1][:p], turn.T[::-1][:p]
        leak = _norm(dot(turn[:k, -k:], outside[-1]))
        goal = jnp.maximum(accuracy * jnp.max(jnp.abs(ritz[:k])), 8 * eps * norm)
        return _Krylov(
            dot(turn, basis[:m]), ritz, basis[m:], jnp.any(leak > goal), now.sweeps + 1
        )

    length = _norm(start)[:, None]
    # Noise keeps an exact eigenvector from hiding those above it.
    block = start / jnp.where(length > 0, length, 1) + accuracy * noise
    last = jax.lax.while_loop(
        lambda now: now.unfinished & (now.sweeps < SWEEPS),
        sweep,
        _Krylov(
            jnp.zeros((p, n), dtype),
            jnp.zeros(p, dtype),
            _orthonormal(block)[0],
            jnp.asarray(True),
            jnp.zeros((), jnp.int32),
        ),
    )
    rows = _orthonormal(last.kept[:k])[0]
    return _measured(rows, apply(rows), last.sweeps)


def _measured(rows, images, sweeps) -> Pairs:
    """Ritz pairs of the orthonormal `rows` [k, n] with the residuals that they have."""
    projected = dot(rows, images.T)
    values, turn = jnp.linalg.eigh(projected)
    values, turn = values[::-1], turn.T[::-1]
    rows, images = dot(turn, rows), dot(turn, images)
    lengths = _norm(images - values[:, None] * rows)
    scale = jnp.maximum(jnp.max(jnp.abs(values)), jnp.finfo(rows.dtype).tiny)
    return Pairs(values, rows, lengths / scale, sweeps)


def _norm(rows):
    """Lengths along the last axis, where squares would over- or underflow too."""
    size = jnp.max(jnp.abs(rows), axis=-1, initial=0.0)
    safe = jnp.where(size > 0, size, 1)
    return size * jnp.linalg.norm(rows / safe[..., None], axis=-1)


def _orthonormal(rows):
    """(q, t) with rows = t q and q orthonormal, whatever the rank of the rows."""
    q, r = jnp.linalg.qr(rows.T)
    return q.T, r.T


def split(rows, basis):
    """Coefficients [m, k] of `rows` [k, n] in an orthonormal basis [m, n], the rest."""
    # Unless kept apart they are computed as rows @ basis.T, slower by 10 on CPUs.
    inside = jax.lax.optimization_barrier(dot(basis, rows.T))
    return inside, rows - dot(inside.T, basis)


def dot(a, b):
    # An accelerator's default precision would not keep a basis orthonormal.
    return jnp.matmul(a, b, precision="highest")
