"""The largest eigenvalues of symmetric operators on pytrees, and their derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from rodjax.linalg._lanczos import Operator, dot, lanczos, split

# Two eigenvalues, relative to the largest, that are one as far as rounding tells; and
# what is left of a vector's derivative: both the dtype's epsilon to this power.
EQUAL = 0.75
# Products spent on the derivative of a vector at most.
PRODUCTS = 500


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

    Values and vectors have derivatives of both modes in what `matvec` closes over, by
    perturbation theory; vectors by conjugate gradients across the eigenvectors that
    were not asked for. Within a multiple eigenvalue they are taken not to turn, so that
    only what does not depend on the choice of its basis has the right derivative; and a
    k that cuts through one leaves them none. Residuals, iterations and the guess have
    no derivatives.

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
    n = start.shape[1]
    if k > n:
        raise ValueError(f"guess has k = {k} vectors of only {n} parameters")
    # Nothing is decomposed in half precision.
    narrow = start.dtype
    start = start.astype(narrow if jnp.finfo(narrow).bits >= 32 else jnp.float32)
    accuracy = float(jnp.finfo(narrow).eps) ** 0.5 if tol is None else tol
    # What the operator closes over becomes an argument, to be differentiated in.
    operator = eqx.filter_closure_convert(
        lambda x: ravel_pytree(matvec(unravel(x.astype(narrow))))[0].astype(x.dtype),
        start[0],
    )
    found = _solve(operator, start, accuracy)
    vectors = jax.vmap(unravel)(found.rows.astype(narrow))
    return Eigenpairs(found.values, vectors, found.residuals, found.sweeps)


_solve = eqx.filter_custom_jvp(lanczos)


@_solve.def_jvp
def _solve_jvp(primals: tuple, tangents: tuple) -> tuple:
    """dl_i = v_i . dA v_i; v_i moves into v_j by v_j . dA v_i / (l_i - l_j)."""
    operator, start, accuracy = primals
    pairs = _solve(operator, start, accuracy)
    change, *_ = tangents
    given = jax.tree.map(lambda t: t is not None, change, is_leaf=lambda t: t is None)
    moving, fixed = eqx.partition(operator, given)
    values, rows = pairs.values, pairs.rows
    images = lambda moving: jax.vmap(eqx.combine(moving, fixed))(rows)
    _, images = jax.jvp(images, (moving,), (change,))

    inside, outside = split(images, rows)
    level = float(jnp.finfo(rows.dtype).eps) ** EQUAL
    size = jnp.max(jnp.abs(values))
    size = jnp.where(size > 0, size, 1)
    gaps = values[:, None] - values[None]
    apart = jnp.abs(gaps) > level * size
    turns = jnp.where(apart, inside.T / jnp.where(apart, gaps, 1), 0)
    d_rows = dot(turns, rows)
    if len(rows) < rows.shape[1]:
        d_rows += jax.vmap(
            lambda value, right: _across(operator, rows, value, right, size, level)
        )(values, outside)
    none = dict.fromkeys(("residuals", "sweeps"))
    return pairs, pairs._replace(values=jnp.diag(inside), rows=d_rows, **none)


def _across(
    operator: Operator,
    rows: Float[Array, "k n"],
    value: Float[Array, ""],
    right: Float[Array, " n"],
    size: Float[Array, ""],
    level: float,
) -> Float[Array, " n"]:
    """x with (value - A) x = `right` on the complement of the eigenvectors `rows`."""
    across = lambda x: x - dot(dot(rows, x), rows)

    def shifted(x):
        y = across(x)
        # Definite along the rows too, and where `value` is an eigenvalue of others.
        return across((value + level * size) * y - operator(y)) + size * (x - y)

    solve = lambda matvec, right: _conjugate_gradients(matvec, right, level)
    # `jax.scipy.sparse.linalg.cg` is not transposed under a vmap, and lineax's CG gives
    # NaN for an operator that is as close to a singular one.
    return jax.lax.custom_linear_solve(shifted, right, solve, solve, symmetric=True)


def _conjugate_gradients(
    matvec: Operator, right: Float[Array, " n"], level: float
) -> Float[Array, " n"]:
    """x with matvec(x) = `right`, up to `level` of it, for a definite operator."""

    def step(carry):
        x, rest, along, square, count = carry
        image = matvec(along)
        length = square / jnp.sum(along * image)
        rest = rest - length * image
        new = jnp.sum(rest * rest)
        return x + length * along, rest, rest + new / square * along, new, count + 1

    square = jnp.sum(right * right)
    goal = level**2 * square
    start = jnp.zeros_like(right), right, right, square, 0
    unfinished = lambda carry: (carry[3] > goal) & (carry[4] < PRODUCTS)
    return jax.lax.while_loop(unfinished, step, start)[0]


def _leading_axis(guess: PyTree) -> int:
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(guess)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "guess must be a pytree whose leaves have one common leading axis k >= 1; "
            f"got leading axes {sorted(sizes)}"
        )
    return sizes.pop()[0]
