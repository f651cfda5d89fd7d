"""The largest eigenvalues of symmetric operators on pytrees, and their derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rodjax.linalg._lobpcg import Operator, lobpcg
from rodjax.linalg._rows import combine, gram, without
from rodjax.linalg._trees import dot

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
    - `iterations`: [], products spent on each vector; 0 if diagonalized directly.
    """

    values: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    iterations: Int[Array, ""]


def top_eigenpair(
    matvec: Callable[[PyTree], PyTree], guess: PyTree, *, tol: float | None = None
) -> Eigenpair:
    """`top_eigenpairs` for the largest eigenvalue alone; no leading axis anywhere.

    A good `guess` (the eigenvector of the previous step) needs about a dozen products,
    eight of which look for an eigenvalue above. Three vectors like the parameters are
    held while a product is computed, and four between two of them.

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
    """The k largest eigenvalues of a symmetric operator, by conjugate gradients.

    Locally optimal block ones (LOBPCG; Knyazev, SIAM J. Sci. Comput. 23, 2001), or for
    k = 1 those up the Rayleigh quotient (Bradbury and Fletcher, Numer. Math. 9, 1966),
    from `guess` until all k residuals are below `tol` or at the level of rounding; then
    eight products with each vector of a block across those found look for what is
    above them, from which the search goes on if there is any. A block of k finds
    eigenvalues of any multiplicity. Small operators are diagonalized directly. Finite
    for any finite operator and guess, in float32 too; vmaps and jits.

    6 k vectors like the parameters are held beside what k products take, for k = 1 as
    few as `top_eigenpair` says, leaf by leaf: where they are sharded over devices
    nothing is gathered.

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
      `None`. After 360 products with each vector the best pairs so far come back with
      their residuals.

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
    guess = jax.tree.map(jnp.asarray, guess)
    n = sum(x[0].size for x in jax.tree.leaves(guess))
    if k > n:
        raise ValueError(f"guess has k = {k} vectors of only {n} parameters")
    narrow = jax.tree.map(lambda x: x.dtype, guess)
    widest = jnp.result_type(*jax.tree.leaves(narrow))
    # Nothing is decomposed in half precision.
    wide = widest if jnp.finfo(widest).bits >= 32 else jnp.dtype(jnp.float32)
    accuracy = float(jnp.finfo(widest).eps) ** 0.5 if tol is None else tol
    start = jax.tree.map(lambda x: x.astype(wide), guess)

    def operate(x: PyTree) -> PyTree:
        image = matvec(jax.tree.map(jnp.astype, x, narrow))
        return jax.tree.map(lambda y: jnp.astype(y, wide), image)

    # What the operator closes over becomes an argument, to be differentiated in.
    one = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), start)
    operator = eqx.filter_closure_convert(operate, one)
    found = _solve(operator, start, accuracy)
    vectors = jax.tree.map(jnp.astype, found.rows, narrow)
    return Eigenpairs(found.values, vectors, found.residuals, found.steps)


_solve = eqx.filter_custom_jvp(lobpcg)


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

    inside, outside = gram(rows, images), without(images, rows)
    level = float(jnp.finfo(values.dtype).eps) ** EQUAL
    size = jnp.max(jnp.abs(values))
    size = jnp.where(size > 0, size, 1)
    gaps = values[:, None] - values[None]
    apart = jnp.abs(gaps) > level * size
    turns = jnp.where(apart, inside.T / jnp.where(apart, gaps, 1), 0)
    d_rows = combine(turns, rows)
    if len(values) < sum(x[0].size for x in jax.tree.leaves(rows)):
        across = jax.vmap(
            lambda value, right: _across(operator, rows, value, right, size, level)
        )(values, outside)
        d_rows = jax.tree.map(jnp.add, d_rows, across)
    none = dict.fromkeys(("residuals", "steps"))
    return pairs, pairs._replace(values=jnp.diag(inside), rows=d_rows, **none)


def _across(
    operator: Operator,
    rows: PyTree,
    value: Float[Array, ""],
    right: PyTree,
    size: Float[Array, ""],
    level: float,
) -> PyTree:
    """x with (value - A) x = `right` on the complement of the eigenvectors `rows`."""

    def across(x: PyTree) -> PyTree:
        one = jax.tree.map(lambda x: x[None], x)
        return jax.tree.map(lambda x: x[0], without(one, rows))

    def shifted(x: PyTree) -> PyTree:
        y = across(x)
        # Definite along the rows too, and where `value` is an eigenvalue of others.
        shift = value + level * size
        moved = jax.tree.map(lambda y, ay: shift * y - ay, y, operator(y))
        return jax.tree.map(lambda m, x, y: m + size * (x - y), across(moved), x, y)

    solve = lambda matvec, right: _conjugate_gradients(matvec, right, level)
    # `jax.scipy.sparse.linalg.cg` is not transposed under a vmap, and lineax's CG gives
    # NaN for an operator that is as close to a singular one.
    return jax.lax.custom_linear_solve(shifted, right, solve, solve, symmetric=True)


def _conjugate_gradients(matvec: Operator, right: PyTree, level: float) -> PyTree:
    """x with matvec(x) = `right`, up to `level` of it, for a definite operator."""
    plus = lambda x, by, y: jax.tree.map(lambda x, y: x + by * y, x, y)

    def step(carry):
        x, rest, along, square, count = carry
        image = matvec(along)
        length = square / dot(along, image)
        rest = plus(rest, -length, image)
        new = dot(rest, rest)
        x, along = plus(x, length, along), plus(rest, new / square, along)
        return x, rest, along, new, count + 1

    square = dot(right, right)
    goal = level**2 * square
    start = jax.tree.map(jnp.zeros_like, right), right, right, square, 0
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
