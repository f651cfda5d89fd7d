"""The largest eigenvalues of symmetric operators on pytrees, by their products alone.

Restarted block Lanczos. `jax.experimental.sparse.linalg.lobpcg_standard` spends four
times the products, never stops on negative eigenvalues and returns NaN for zero ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

# Up to this many parameters the matrix is formed and diagonalized directly.
DENSE = 32
# Block products of one Lanczos sweep of one vector and of several, sweeps at most.
KRYLOV = 12
BLOCK_KRYLOV = 6
SWEEPS = 30
# Ritz vectors kept beyond twice those wanted: with fewer the last converge slowly.
BUFFER = 3


class Eigenpair(NamedTuple):
    """The algebraically largest eigenvalue of a symmetric operator.

    - `value`: [].
    - `vector`: unit norm, a pytree like the parameters.
    - `residual`: |A v - value v| / |value|, []. Some eigenvalue lies within this
      relative distance of `value`; a residual above the tolerance means that it has
      not converged.
    """

    value: Float[Array, ""]
    vector: PyTree
    residual: Float[Array, ""]


class Eigenpairs(NamedTuple):
    """The k algebraically largest eigenvalues of a symmetric operator.

    - `values`: [k], descending, with multiplicity.
    - `vectors`: a pytree like the parameters with a leading axis k, orthonormal. Of a
      multiple eigenvalue, some basis of its eigenspace.
    - `residuals`: [k], |A v_i - value_i v_i| / max_j |value_j|. Some eigenvalue lies
      within this relative distance of `value_i`; a residual above the tolerance means
      that it has not converged.
    - `iterations`: [], sweeps spent; 0 if diagonalized directly.
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    iterations: Int[Array, ""]


class _Krylov(NamedTuple):
    """Between two sweeps: A kept_i = ritz_i kept_i + a combination of `block`."""

    kept: Float[Array, "p n"]
    ritz: Float[Array, " p"]
    block: Float[Array, "k n"]
    unfinished: Array
    sweeps: Int[Array, ""]


def top_eigenpair(
    matvec: Callable[[PyTree], PyTree], guess: PyTree, *, tol: float | None = None
) -> Eigenpair:
    """`top_eigenpairs` for the largest eigenvalue alone; no leading axis anywhere.

    A good `guess` (the eigenvector of the previous step) needs one sweep, 13 products.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> scale = jnp.arange(1.0, 101.0)
    >>> pair = rj.top_eigenpair(lambda v: scale * v, jnp.ones(100))
    >>> float(pair.value.round(6)), bool(pair.residual < 1e-3)
    (100.0, True)

    ```
    """
    one = top_eigenpairs(
        matvec, jax.tree.map(lambda x: jnp.expand_dims(x, 0), guess), tol=tol
    )
    first = lambda x: x[0]
    return Eigenpair(
        first(one.values), jax.tree.map(first, one.vectors), first(one.residuals)
    )


def top_eigenpairs(
    matvec: Callable[[PyTree], PyTree], guess: PyTree, *, tol: float | None = None
) -> Eigenpairs:
    """The k largest eigenvalues of a symmetric operator, by restarted block Lanczos.

    Sweeps of a short block Lanczos process with full reorthogonalization, each started
    from the best Ritz vectors of the one before (thick restart: Wu and Simon, SIAM J.
    Matrix Anal. Appl. 22, 2000), until all k residuals are below `tol` or at the level
    of rounding. A good `guess` (the eigenvectors of the previous step) needs one sweep.
    A block of k finds eigenvalues of any multiplicity. Small operators are diagonalized
    directly. Finite for any finite operator and guess, in float32 too; vmaps and jits.

    **Arguments**

    - `matvec`: pytree -> pytree, linear and symmetric; called under `jax.vmap`.
    - `guess`: a pytree of its argument's structure with a leading axis k >= 1. Equal,
      dependent or zero entries are completed by random ones.
    - `tol`: relative residual to reach; the square root of the dtype's epsilon if
      `None`. After 30 sweeps the best pairs so far come back with their residuals.

    **Raises** `ValueError` if the leaves of `guess` have no common leading axis k, with
    1 <= k <= the number of parameters.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> scale = jnp.arange(1.0, 101.0)
    >>> pairs = rj.top_eigenpairs(lambda v: scale * v, jnp.ones((3, 100)))
    >>> [round(x, 3) for x in pairs.values.tolist()]
    [100.0, 99.0, 98.0]
    >>> bool(pairs.residuals.max() < 1e-3)
    True

    ```
    """
    k = _leading_axis(guess)
    unravel = ravel_pytree(jax.tree.map(lambda x: x[0], guess))[1]
    start = jax.vmap(lambda tree: ravel_pytree(tree)[0])(guess)
    n, dtype = start.shape[1], start.dtype
    if k > n:
        raise ValueError(f"guess has k = {k} vectors of only {n} parameters")

    @jax.vmap
    def apply(x):
        return ravel_pytree(matvec(unravel(x)))[0]

    steps = KRYLOV if k == 1 else BLOCK_KRYLOV
    p = 2 * k + BUFFER
    m = p + steps * k
    if n <= max(DENSE, 2 * m):
        matrix = apply(jnp.eye(n, dtype=dtype))
        rows = jnp.linalg.eigh(matrix)[1][:, ::-1][:, :k].T
        return _measured(rows, _dot(rows, matrix), jnp.zeros((), jnp.int32), unravel)

    eps = float(jnp.finfo(dtype).eps)
    accuracy = eps**0.5 if tol is None else tol
    noise = jax.random.normal(jax.random.key(0), (k, n), dtype) / n**0.5

    def expand(carry, step):
        basis, sweeps = carry
        images = apply(jax.lax.dynamic_slice_in_dim(basis, p + step * k, k))
        inside, rest = _split(images, basis)
        # Where a Krylov space ends it goes on at random: noise at the rounding level.
        size = jnp.max(jnp.linalg.norm(images, axis=1))
        level = jnp.where(size > 0, 8 * eps * size, 1)
        rest += level * jnp.roll(noise, sweeps * steps + step + 1, axis=1)
        rest, outer = _orthonormal(rest)
        rest, inner = _orthonormal(_split(rest, basis)[1])
        basis = jax.lax.dynamic_update_slice_in_dim(basis, rest, p + (step + 1) * k, 0)
        return (basis, sweeps), (inside, jnp.where(size > 0, _dot(outer, inner), 0))

    def sweep(now):
        basis = jnp.zeros((m + k, n), dtype).at[:p].set(now.kept)
        basis = basis.at[p : p + k].set(now.block)
        (basis, _), (inside, outside) = jax.lax.scan(
            expand, (basis, now.sweeps), jnp.arange(steps)
        )
        # The part of the projected operator on and above the diagonal.
        inside = jnp.moveaxis(inside, 0, 1).reshape(m + k, -1)
        upper = jnp.zeros((m, m), dtype).at[:, p:].set(inside[:m])
        norm = jnp.linalg.norm(upper)
        # Rows that the first sweep leaves empty are to sort below any Ritz value.
        low = jnp.where(norm > 0, -2 * norm, -1)
        upper = upper.at[jnp.arange(p), jnp.arange(p)].set(
            jnp.where(now.sweeps > 0, now.ritz, low)
        )
        ritz, turn = jnp.linalg.eigh(jnp.triu(upper) + jnp.triu(upper, 1).T)
        ritz, turn = ritz[::-1][:p], turn.T[::-1][:p]
        leak = jnp.linalg.norm(_dot(turn[:k, -k:], outside[-1]), axis=1)
        goal = jnp.maximum(accuracy * jnp.max(jnp.abs(ritz[:k])), 8 * eps * norm)
        return _Krylov(
            _dot(turn, basis[:m]), ritz, basis[m:], jnp.any(leak > goal), now.sweeps + 1
        )

    length = jnp.linalg.norm(start, axis=1, keepdims=True)
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
    return _measured(rows, apply(rows), last.sweeps, unravel)


def _measured(rows, images, sweeps, unravel) -> Eigenpairs:
    """Ritz pairs of the orthonormal `rows` [k, n] with the residuals that they have."""
    projected = _dot(rows, images.T)
    values, turn = jnp.linalg.eigh(projected)
    values, turn = values[::-1], turn.T[::-1]
    rows, images = _dot(turn, rows), _dot(turn, images)
    lengths = jnp.linalg.norm(images - values[:, None] * rows, axis=1)
    scale = jnp.maximum(jnp.max(jnp.abs(values)), jnp.finfo(rows.dtype).tiny)
    return Eigenpairs(values, jax.vmap(unravel)(rows), lengths / scale, sweeps)


def _orthonormal(rows):
    """(q, t) with rows = t q and q orthonormal, whatever the rank of the rows."""
    q, r = jnp.linalg.qr(rows.T)
    return q.T, r.T


def _split(rows, basis):
    """Coefficients [m, k] of `rows` [k, n] in an orthonormal basis [m, n], the rest."""
    # Unless kept apart they are computed as rows @ basis.T, slower by 10 on CPUs.
    inside = jax.lax.optimization_barrier(_dot(basis, rows.T))
    return inside, rows - _dot(inside.T, basis)


def _dot(a, b):
    # An accelerator's default precision would not keep a basis orthonormal.
    return jnp.matmul(a, b, precision="highest")


def _leading_axis(guess: PyTree) -> int:
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(guess)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "guess must be a pytree whose leaves have one common leading axis k >= 1; "
            f"got leading axes {sorted(sizes)}"
        )
    return sizes.pop()[0]
