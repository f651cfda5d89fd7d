"""Semidefinite complementarity problems of a few dimensions, solved inside a jit."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from rodjax.linalg._elimination import inverse, is_positive

# Interior-point iterations at most; 10 are usual, 25 a very ill-conditioned problem.
ITERATIONS = 40
# X and S both start at this multiple of the identity, of the scaled problem.
START = 3.0
# Step lengths, tried all at once: dense near 1, where Newton's method is fast.
STEPS = np.array(
    [1, 0.99, 0.97, 0.93, 0.87, *np.arange(8, 0, -1) / 10, 0.03, 0.01, 0.001]
)
# A predictor shorter than SHORT centers by at least CENTERING.
SHORT, CENTERING = 0.1, 0.3
# What the last step, which centers only, leaves of the gap <X, S>.
RECENTERING = 0.5
# Each squares the errors of an approximate projector.
PURIFICATIONS = 3


class Complementary(NamedTuple):
    r"""Solution of a semidefinite complementarity problem.

    - `x`: X, [k, k], symmetric and positive semidefinite.
    - `slack`: S = A + B[X], [k, k], of this X; positive semidefinite up to `residual`.
    - `residual`: $\max(|S - S_+|, |\langle X, S\rangle| / |X|) / |A|$ in Frobenius
      norms, [], without units. S_+ is a positive semidefinite matrix that the solver
      holds, so the first term bounds the negative part of S. 0 if X = 0 is exact.
    - `iterations`: interior-point iterations, []; 0 if A is positive semidefinite.
    """

    x: Float[Array, "k k"]
    slack: Float[Array, "k k"]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]


class _Iterate(NamedTuple):
    """X and S_+, positive definite, and what `Complementary` says of this X."""

    x: Float[Array, "k k"]
    s: Float[Array, "k k"]
    slack: Float[Array, "k k"]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


# Sums of products, here and below: a dot would be a library call, which does not fuse.
def _norm(m: Array) -> Array:
    return jnp.sqrt(jnp.sum(m * m))


def _apply(b: Array, x: Array) -> Array:
    return jnp.sum(b * x[None, None], axis=(2, 3))


def _matmul(m: Array, n: Array) -> Array:
    return jnp.sum(m[:, :, None] * n[None], axis=1)


def _step_length(x: Array, dx: Array, s: Array, ds: Array, share: ArrayLike) -> Array:
    """Longest of STEPS within this share of the way out of the cone; 0 if none is."""
    steps = jnp.asarray(STEPS, x.dtype)
    reach = (steps / share)[:, None, None]
    inside = is_positive(x[None] + reach * dx[None])
    inside = inside & is_positive(s[None] + reach * ds[None])
    return jnp.max(jnp.where(inside, steps, 0))


def _measured(a: Array, b: Array, x: Array, s: Array, iterations: Array) -> _Iterate:
    slack = a + _apply(b, x)
    size, scale = _norm(x), _norm(a)
    overlap = jnp.abs(jnp.sum(x * slack)) / jnp.where(size == 0, 1, size)
    error = jnp.maximum(_norm(slack - s), overlap)
    residual = error / jnp.where(scale == 0, 1, scale)
    return _Iterate(x, s, slack, residual, iterations, jnp.zeros((), bool))


def _newton_solver(b: Array, s: Array, z: Array) -> Callable[[Array], Array]:
    """Solver of B[D] + (S D Z + Z D S) / 2 = R for symmetric D."""
    k = len(s)
    rows, columns = np.triu_indices(k)
    place = np.zeros((k, k), int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    # An off-diagonal coordinate stands for two entries.
    weight = jnp.asarray(np.where(rows == columns, 1, 2), s.dtype)
    i, j, m, n = rows[:, None], columns[:, None], rows[None], columns[None]
    product = s[i, m] * z[j, n] + s[i, n] * z[j, m]
    product = product + s[j, m] * z[i, n] + s[j, n] * z[i, m]
    operator = (b[i, j, m, n] + product / 4) * weight[:, None] * weight[None]
    inverted = inverse(operator)

    def solve(right):
        right = right[rows, columns] * weight
        return jnp.sum(inverted * right[None], axis=1)[place]

    return solve


def _iterate(state: _Iterate, a: Array, b: Array, tol: ArrayLike) -> _Iterate:
    """One predictor and corrector step; the last one, below `tol`, recentres."""
    x, s, slack = state.x, state.s, state.slack
    z = inverse(x)
    z = (z + z.T) / 2
    solve = _newton_solver(b, s, z)

    def direction(right):
        dx = solve(right)
        return dx, slack - s + _apply(b, dx)

    dx, ds = direction(-slack)
    length = _step_length(x, dx, s, ds, 1)
    gap = jnp.sum(x * s)
    centering = jnp.sum((x + length * dx) * (s + length * ds)) / gap
    centering = jnp.clip(centering, 0, 1) ** 2
    centering = jnp.where(length < SHORT, jnp.maximum(centering, CENTERING), centering)
    # Off the central path X is wrong by the root of the gap rather than the gap.
    last = state.residual <= tol
    centering = jnp.where(last, RECENTERING, centering)
    second = jnp.where(last, 0, _matmul(_matmul(ds, dx), z))
    target = centering * gap / len(x) * z - (second + second.T) / 2
    dx, ds = direction(target - slack)
    length = _step_length(x, dx, s, ds, 0.9 + 0.09 * length)
    new = _measured(a, b, x + length * dx, s + length * ds, state.iterations + 1)

    # Once only rounding is left, the residual may rise again.
    close = state.residual < float(jnp.finfo(x.dtype).eps) ** 0.4
    worse = close & (new.residual > state.residual)
    good = (length > 0) & jnp.isfinite(new.residual) & ~worse
    stalled = close & (new.residual > state.residual / 2)
    kept = state._replace(iterations=new.iterations)
    chosen = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, kept)
    return chosen._replace(done=last | ~good | stalled)


def complementarity(
    a: Float[ArrayLike, "k k"],
    b: Float[ArrayLike, "k k k k"],
    *,
    tol: float | None = None,
) -> Complementary:
    r"""Positive semidefinite X whose slack A + B[X] is so too, and orthogonal to X.

    $$0 \preceq X, \quad 0 \preceq S = A + B[X], \quad \langle X, S\rangle = 0,
    \qquad B[X]_{ij} = \sum_{kl} B_{ijkl} X_{kl},$$

    that is, the minimizer of $\langle A, X\rangle + \langle X, B[X]\rangle / 2$ over
    positive semidefinite X. The central flow of Cohen et al. (arXiv 2410.24206) asks
    for it at every instant, X being the covariance of the oscillation.

    By a primal-dual interior-point method: the direction of Helmberg, Rendl, Vanderbei
    and Wolkowicz (1996), Mehrotra's predictor and corrector. It is made for k up to 4,
    and correct for more: no library calls, so that XLA fuses it. Jits and vmaps. The
    problem is scaled first, so units do not matter.

    X and the slack have derivatives of both modes in A and B, by one linear solve, that
    are right where the solution is strictly complementary: where X + S is definite, so
    that no eigenvalue is just entering or leaving. `residual` and `iterations` have
    none.

    Where B is singular X need not be unique, and may not exist: then the result is
    finite, with a large residual. Rounding may keep an X far larger or smaller than
    |A| / trace B from reaching `tol`; the residual tells.

    **Arguments**

    - `a`: A, [k, k], symmetric.
    - `b`: B, [k, k, k, k], symmetric in its first two indices, in its last two and in
      the exchange of both pairs; positive semidefinite on symmetric matrices.
    - `tol`: residual to reach; the dtype's epsilon to the power 0.7 if `None`: 1e-11 in
      float64, 1e-5 in float32. X is less exact, by its conditioning: 1e-7 and 1e-4.

    X is exactly 0 if A is positive semidefinite up to rounding. Raises `ValueError` if
    shapes do not fit.

    ```python
    >>> import jax.numpy as jnp
    >>> from rodjax.linalg import complementarity
    >>> a = jnp.diag(jnp.array([-3.0, 1.0]))
    >>> b = jnp.einsum("ij,kl->ijkl", jnp.eye(2), jnp.eye(2))  # B[X] = trace(X) 1
    >>> x, slack, residual, _ = complementarity(a, b)
    >>> jnp.diag(x).round(4).tolist(), jnp.diag(slack).round(4).tolist()
    ([3.0, 0.0], [0.0, 4.0])

    ```
    """
    dtype = jnp.result_type(a, b, float)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"a must be a square matrix, not of shape {a.shape}")
    k = len(a)
    if b.shape != (k,) * 4:
        raise ValueError(f"b must have shape {(k,) * 4} as a has, not {b.shape}")
    target = float(jnp.finfo(dtype).eps) ** 0.7 if tol is None else tol

    # Scaled so that |A| is 1 and the eigenvalues of B are 1 on average.
    largest = jnp.max(jnp.abs(a))
    a_scale = jnp.where(largest == 0, 1, largest)
    a_scale = a_scale * jnp.maximum(_norm(a / a_scale), 1)
    trace = jnp.einsum("ijij->", b)
    b_scale = jnp.where(trace <= 0, 1, trace) / (k * (k + 1) // 2)
    # The problem is homogeneous: the scales may be constants of any derivative.
    a_scale, b_scale = jax.lax.stop_gradient((a_scale, b_scale))
    a, b = a / a_scale, b / b_scale

    end = _solve(a, b, target)
    return Complementary(
        end.x * (a_scale / b_scale), end.slack * a_scale, end.residual, end.iterations
    )


@eqx.filter_custom_jvp
def _solve(a: Array, b: Array, tol: float) -> _Iterate:
    """The solution of a scaled problem."""
    k, epsilon = len(a), float(jnp.finfo(a.dtype).eps)
    eye, none = jnp.eye(k, dtype=a.dtype), jnp.zeros((), jnp.int32)
    if k == 1:
        x = jnp.where(b[0, 0] > 0, jnp.maximum(-a, 0), 0)
        return _measured(a, b, x, jnp.maximum(a + x, 0), none)
    psd = is_positive(a + 8 * k * epsilon * eye)
    start = _measured(a, b, START * eye, START * eye, none)
    end = jax.lax.while_loop(
        lambda state: ~state.done & (state.iterations < ITERATIONS),
        lambda state: _iterate(state, a, b, tol),
        start._replace(done=psd),
    )
    zero = _Iterate(0 * eye, a, a, jnp.zeros((), a.dtype), none, psd)
    return jax.tree.map(lambda z, e: jnp.where(psd, z, e), zero, end)


@_solve.def_jvp
def _solve_jvp(primals: tuple, tangents: tuple) -> tuple:
    """By one solve with the operator of Newton's method, as it is at the solution.

    From X S = 0, on eigenvectors of x, s > 0: dS = 0 among those of X, dX = 0 among
    those of S, and s dX + x dS = 0 between them, where dS = dA + dB[X] + B[dX].
    """
    (a, b, tol), (da, db, _) = primals, tangents
    end = _solve(a, b, tol)
    nothing = jnp.all(end.x == 0)
    both = inverse(end.s + jnp.where(nothing, jnp.eye(len(a), dtype=a.dtype), end.x))
    # The projector onto the range of S, which is S / (X + S) but for the last gap.
    p = _matmul(end.s, both)
    for _ in range(PURIFICATIONS):
        p = (p + p.T) / 2
        p = 3 * _matmul(p, p) - 2 * _matmul(p, _matmul(p, p))
    s = 2 * _matmul(p, _matmul(end.s, p))
    # The root balances what rounding leaves of X in S against what is left of dX in S.
    z = both + p / float(jnp.finfo(a.dtype).eps) ** 0.5
    # No tangent at all is `None`.
    push = (0 * a if da is None else da) + (0 if db is None else _apply(db, end.x))
    push = (push + push.T) / 2
    dx = jnp.where(nothing, 0, _newton_solver(b, s, z)(-push))
    moved = push + _apply(b, dx)
    none = dict.fromkeys(("residual", "iterations", "done"))
    return end, end._replace(x=dx, s=moved, slack=moved, **none)
