"""The largest eigenvalue for a given number of products, leaf by leaf."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rodjax.linalg._eigen import Eigenpair
from rodjax.linalg._trees import alike, dot, norm, over, scattered, unit

# Products between two restarts, each of which is a vector in memory.
CYCLE = 3
# What is left of a vector, below which rounding spoils what it was made orthogonal to.
LOST = 0.1
# Roundoffs below which a Krylov space has ended.
ENDED = 8
# Relative to the largest entry of a projected operator, below all its eigenvalues.
ABSENT = -2.0 * CYCLE


def refined_eigenpair(
    matvec: Callable[[PyTree], PyTree], guess: PyTree, products: int
) -> Eigenpair:
    r"""The largest eigenpair of a symmetric operator, as `products` products tell it.

    For a guess that is good already, or a model that is too large for `top_eigenpair`:
    Lanczos' method from the guess, restarted from its best vector after every three
    products. One product is the guess's Rayleigh quotient $v^T A v$, and turns the
    vector by one damped power iteration for the next call. The value never exceeds the
    largest eigenvalue but for rounding; some eigenvalue lies within the residual of it.

    Four vectors like the parameters are held beside what a product takes, in their own
    leaves with their own shardings; in single precision if the parameters are in half.

    **Arguments**

    - `matvec`: pytree -> pytree, linear and symmetric.
    - `guess`: like its argument, one vector; random where it is zero or not finite.
    - `products`: calls of `matvec`, at least 1.

    **Raises** `ValueError` for `products` below 1.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> scale = jnp.arange(1.0, 101.0)
    >>> product = lambda v: scale * v
    >>> pair = rj.linalg.refined_eigenpair(product, jnp.ones(100), products=3)
    >>> better = rj.linalg.refined_eigenpair(product, pair.vector, products=30)
    >>> round(float(pair.value)), round(float(better.value), 1)
    (89, 99.7)

    ```
    """
    if products < 1:
        raise ValueError(f"products must be at least 1; got {products}")
    wide = lambda x: jnp.asarray(x, np.promote_types(jnp.result_type(x), np.float32))
    narrow = jax.tree.map(jnp.result_type, guess)

    def product(v: PyTree) -> PyTree:
        image = matvec(jax.tree.map(jnp.astype, v, narrow))
        return alike(jax.tree.map(wide, image), v)

    guess = jax.tree.map(wide, guess)
    size = norm(guess)
    vector = jax.lax.cond(
        (size > 0) & jnp.isfinite(size),
        lambda: guess,
        lambda: alike(scattered(guess, 0), guess),
    )
    vector = unit(vector)
    rounds, few = divmod(products, CYCLE)
    pair = Eigenpair(jnp.zeros(()), vector, jnp.zeros(()))
    if few:
        pair = _cycle(product, pair.vector, few)
    if rounds:
        again = lambda _, pair: _cycle(product, pair.vector, CYCLE)
        pair = _cycle(product, pair.vector, CYCLE)
        pair = jax.lax.fori_loop(1, rounds, again, pair)
    return pair._replace(vector=jax.tree.map(jnp.astype, pair.vector, narrow))


def _cycle(product: Callable[[PyTree], PyTree], start: PyTree, m: int) -> Eigenpair:
    """The best pair of the Krylov space of `m` products, from a `start` of unit length.

    Of one product, the pair of `start`, turned by a power iteration.
    """
    first = lambda x: jnp.zeros((m, *x.shape), x.dtype).at[0].set(x)
    dtype = jnp.result_type(*jax.tree.leaves(start))

    def step(j: Array, carry: tuple):
        basis, inside, _, _ = carry
        image = product(jax.tree.map(lambda x: x[j], basis))
        whole = norm(image)
        along = _along(basis, image)
        rest = _less(image, along, basis)

        def once_more() -> tuple[PyTree, Array]:
            missed = _along(basis, rest)
            return _less(rest, missed, basis), along + missed

        rest, along = jax.lax.cond(
            norm(rest) < LOST * whole, once_more, lambda: (rest, along)
        )
        left = norm(rest)
        # Of what is rounding alone a vector would be made that is in the basis already.
        left = jnp.where(left > ENDED * jnp.finfo(dtype).eps * whole, left, 0)
        new = jax.tree.map(lambda x: jnp.where(left > 0, x, 0), over(rest, left))
        # The last has no place in the basis any more.
        put = lambda x, y: x.at[jnp.where(j + 1 < m, j + 1, m)].set(y, mode="drop")
        return jax.tree.map(put, basis, new), inside.at[:, j].set(along), left, new

    none = jnp.zeros((), dtype)
    carry = jax.tree.map(first, start), jnp.zeros((m, m), dtype), none, start
    basis, inside, left, new = jax.lax.fori_loop(0, m, step, carry)

    largest = jnp.max(jnp.abs(inside))
    safe = jnp.where(largest > 0, largest, 1)
    upper = jnp.triu(inside / safe)
    # Where the Krylov space has ended there is no vector.
    there = jax.vmap(dot)(basis, basis) > 0.5
    absent = jnp.diag(jnp.where(there, 0, ABSENT))
    values, turns = jnp.linalg.eigh(upper + jnp.triu(upper, 1).T + absent)
    value, turn = safe * values[-1], turns[:, -1]
    leak = left * jnp.abs(turn[-1])
    combine = lambda x: jnp.tensordot(turn.astype(x.dtype), x, 1, precision="highest")
    vector = jax.tree.map(combine, basis)
    if m == 1:
        by = leak / jnp.maximum(jnp.abs(value) + leak, jnp.finfo(dtype).tiny)
        vector = jax.tree.map(lambda x, y: x + by.astype(x.dtype) * y, vector, new)
    scale = jnp.maximum(jnp.abs(value), jnp.finfo(dtype).tiny)
    return Eigenpair(value, unit(vector), leak / scale)


def _along(basis: PyTree, tree: PyTree) -> Float[Array, " m"]:
    """The inner products of a vector with those of the basis."""
    return jax.vmap(lambda row: dot(row, tree))(basis)


def _less(tree: PyTree, along: Array, basis: PyTree) -> PyTree:
    """`tree` without its parts along the basis."""

    def each(x: Array, rows: Array) -> Array:
        for i in range(len(rows)):
            x = x - along[i].astype(x.dtype) * rows[i]
        return x

    return jax.tree.map(each, tree, basis)
