"""Locally optimal block conjugate gradients: the largest eigenvalues of an operator.

`jax.experimental.sparse.linalg.lobpcg_standard` takes flat vectors alone, never stops
on negative eigenvalues and returns NaN for zero ones. One eigenvalue alone is left to
`_ascent`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from rodjax.linalg._ascent import ascend
from rodjax.linalg._rows import (
    ROUNDING,
    basis_of,
    column,
    combine,
    gram,
    inverse_root,
    lengths,
    symmetric,
    weigh,
    without,
)
from rodjax.linalg._trees import alike, scattered, unit

Operator = Callable[[PyTree], PyTree]

# Up to this many parameters, or so many for each eigenvalue, the matrix is formed.
DENSE = 32
DENSE_EACH = 12
# Products with each vector at most, and those that look for an eigenvalue above.
STEPS = 360
LOOK = 8
# Searches at most, each from what the look of the one before has found above.
ROUNDS = 4


class Pairs(NamedTuple):
    """`Eigenpairs` with their vectors as rows."""

    values: Float[Array, " k"]
    rows: PyTree
    residuals: Float[Array, " k"]
    steps: Int[Array, ""]


class _Climb(NamedTuple):
    """Between two products.

    - `x`: k Ritz vectors, `p`: what moved them last, orthonormal; `ax`, `ap` are what
      the operator makes of them.
    - `inside`: the operator projected onto both, [2k, 2k].
    - `moved`: whether there is such a p, [k].
    - `off`: |A x - value x|, [k]; `size`: of the operator, as far as it was seen.
    - `exact`: whether `ax` is a product, and not a sum of products and their rounding.
    """

    x: PyTree
    ax: PyTree
    p: PyTree
    ap: PyTree
    inside: Float[Array, "k2 k2"]
    moved: Bool[Array, " k"]
    off: Float[Array, " k"]
    size: Float[Array, ""]
    exact: Bool[Array, ""]
    steps: Int[Array, ""]

    @property
    def values(self) -> Float[Array, " k"]:
        return jnp.diag(self.inside)[: len(self.off)]

    def goal(self, accuracy: float) -> Float[Array, ""]:
        """For the residuals: `accuracy`, or the level of rounding."""
        least = ROUNDING * float(jnp.finfo(self.off.dtype).eps) * self.size
        return jnp.maximum(0.5 * accuracy * jnp.max(jnp.abs(self.values)), least)


class _Search(NamedTuple):
    """Between two searches, of which the next begins with the rows of `pairs`."""

    pairs: Pairs
    rounds: Int[Array, ""]
    unfinished: Bool[Array, ""]


def lobpcg(operator: Operator, guess: PyTree, accuracy: float) -> Pairs:
    """The k largest eigenvalues of `operator`, found from k vectors to start from.

    Until all residuals are below `accuracy` or at the level of rounding, and a look
    across the vectors finds nothing larger. Leaves of `guess` have a leading axis k and
    one dtype.
    """
    apply = jax.vmap(operator)
    leaves = jax.tree.leaves(guess)
    k, n = len(leaves[0]), sum(x[0].size for x in leaves)
    if n <= max(DENSE, DENSE_EACH * k):
        return _dense(apply, guess)
    if k == 1:
        return _one(operator, guess, accuracy)
    eps = float(jnp.finfo(leaves[0].dtype).eps)

    def noise(count):
        return jax.tree.map(lambda x: x / n**0.5, scattered(guess, count))

    def search(now: _Search) -> _Search:
        last = now.pairs
        found = _climb(apply, last.rows, [], accuracy, STEPS - last.steps)
        done = jnp.all(found.off <= found.goal(accuracy))
        # What moved them last leads to the next, if to any.
        aside = jax.tree.map(jnp.add, found.p, noise(now.rounds + 1))
        aside, _ = basis_of(aside, [found.x])
        look = jnp.where(done, LOOK, 0)
        rival = _climb(apply, aside, [found.x], accuracy, look)
        # The largest k of both, for both are sorted.
        above = rival.values[::-1] > found.values + ROUNDING * eps * found.size
        again = done & jnp.any(above) & (now.rounds + 1 < ROUNDS)
        swap = lambda x, z: jnp.where(column(again & above, x) > 0, z[::-1], x)
        rows = jax.tree.map(swap, found.x, rival.x)
        steps = last.steps + found.steps + rival.steps
        pairs = Pairs(found.values, rows, found.off, steps)
        return _Search(pairs, now.rounds + 1, again)

    # Noise keeps an exact eigenvector from hiding those above it.
    drawn = noise(0)
    begin = jax.tree.map(lambda x, y: x + accuracy * y, jax.vmap(unit)(guess), drawn)
    begin, _ = basis_of(begin, [], fill=drawn)
    none, zero = jnp.zeros(k, leaves[0].dtype), jnp.zeros((), jnp.int32)
    first = _Search(Pairs(none, begin, none, zero), zero, jnp.asarray(True))
    pairs = jax.lax.while_loop(lambda now: now.unfinished, search, first).pairs
    # Whatever rounding has done to their lengths and their order.
    order = jnp.argsort(-pairs.values)
    root = inverse_root(gram(pairs.rows, pairs.rows))[order]
    values, off = pairs.values[order], pairs.residuals[order]
    rows = combine(root, pairs.rows)
    return Pairs(values, rows, _relative(off, values), pairs.steps)


def _one(operator: Operator, guess: PyTree, accuracy: float) -> Pairs:
    """With fewer vectors, by `ascend`."""
    start = jax.tree.map(lambda x: x[0], guess)
    top = ascend(operator, start, accuracy, STEPS, LOOK)
    value, off, x = jax.tree.map(lambda x: x[None], (top.value, top.off, top.x))
    return Pairs(value, x, _relative(off, value), top.steps)


def _climb(
    apply: Operator, start: PyTree, fixed: list[PyTree], accuracy: float, limit: Array
) -> _Climb:
    """From orthonormal rows, across `fixed` ones, by at most `limit` products each."""
    k, dtype = len(jax.tree.leaves(start)[0]), jnp.result_type(*jax.tree.leaves(start))
    every = jnp.ones(k, bool)

    def step(now: _Climb) -> _Climb:
        # At first, and at last, the product is that with x, which so takes w's place.
        look = ~jnp.any(now.off > now.goal(accuracy))
        rest = jax.tree.map(jnp.subtract, now.ax, weigh(now.values, now.x))
        rest = weigh(jnp.where(now.off > 0, 1 / now.off, 0), rest)
        w, there = basis_of(rest, [*fixed, now.x, now.p])
        w = jax.tree.map(lambda x, w: jnp.where(look, x, w), now.x, w)
        aw = alike(apply(w), w)
        for rows in fixed:
            aw = without(aw, rows)
        beside = jnp.concatenate([gram(now.x, aw), gram(now.p, aw)])
        inside = jnp.block([[now.inside, beside], [beside.T, gram(w, aw)]])
        present = jnp.concatenate([every & ~look, now.moved, there | look])
        turn = _turn(inside, present, look)
        either = lambda x, w: jnp.where(look, w, x)
        x, p = turn.of(jax.tree.map(either, now.x, w), now.p, w)
        ax, ap = turn.of(jax.tree.map(either, now.ax, aw), now.ap, aw)
        off = jax.tree.map(jnp.subtract, ax, weigh(jnp.diag(turn.inside)[:k], x))
        size = jnp.maximum(now.size, turn.size)
        four, off, steps = (x, ax, p, ap), lengths(off), now.steps + 1
        return _Climb(*four, turn.inside, turn.moved, off, size, look, steps)

    def unfinished(now: _Climb) -> Array:
        short = jnp.any(now.off > now.goal(accuracy))
        return (now.steps < limit) & (short | ~now.exact)

    # Not of zeros alone, which would be there before `start` is.
    zero, nothing = jnp.zeros((), dtype), jax.tree.map(lambda x: 0 * x, start)
    first = _Climb(
        start,
        nothing,
        nothing,
        nothing,
        jnp.zeros((2 * k, 2 * k), dtype),
        ~every,
        jnp.zeros(k, dtype),
        zero,
        jnp.asarray(False),
        jnp.zeros((), jnp.int32),
    )
    return jax.lax.while_loop(unfinished, step, first)


class _Turn(NamedTuple):
    """From x, p and w to the Ritz vectors of what they span, and what moves them there.

    - `p`, `w`: of the step s = `p` p + `w` w, k orthonormal vectors.
    - `whole`: [2k, 2k], of the new x and p in x and s.
    - `inside`, `moved`: as in `_Climb`; `size`: of the largest entry inside.
    """

    p: Float[Array, "k k"]
    w: Float[Array, "k k"]
    whole: Float[Array, "k2 k2"]
    inside: Float[Array, "k2 k2"]
    moved: Bool[Array, " k"]
    size: Float[Array, ""]

    def of(self, x: PyTree, p: PyTree, w: PyTree) -> tuple[PyTree, PyTree]:
        k = len(self.p)
        step = _sum(combine(self.p, p), combine(self.w, w))
        both = lambda c: _sum(combine(c[:, :k], x), combine(c[:, k:], step))
        return both(self.whole[:k]), both(self.whole[k:])


def _turn(inside: Array, present: Array, look: Array) -> _Turn:
    """Of the projected operator `inside`, in which not all need be `present`.

    The x in it is w if `look`.
    """
    k, dtype = len(present) // 3, inside.dtype
    inside = jnp.where(present[:, None] & present[None], inside, 0)
    inside = 0.5 * (inside + inside.T)
    size = jnp.max(jnp.abs(inside))
    # Of what is not there the values are below all others.
    absent = jnp.where(present, 0, -2.0 * len(inside)).astype(dtype)
    scaled = inside / jnp.where(size > 0, size, 1) + jnp.diag(absent)
    turn = symmetric(scaled)[1][:, ::-1][:, :k]
    # Of what is next to nothing a unit vector is made below.
    turn = jnp.where(present[:, None], turn, 0)
    # All of it but what was x before, and only the directions of that.
    unit = jnp.eye(3 * k, dtype=dtype)
    of_x = jnp.where(look, unit[:, 2 * k :], unit[:, :k])
    step = turn - of_x @ (of_x.T @ turn)
    length = jnp.linalg.norm(step, axis=0)
    step, there = _columns(step / jnp.where(length > 0, length, 1)[None])
    # What is across the new x, of that in turn.
    old = jnp.concatenate([of_x, step], 1)
    new = old.T @ turn
    rest = jnp.linalg.qr(new, mode="complete")[0][:, k:]
    here = jnp.concatenate([jnp.ones(k, bool), there])
    rest, moved = _columns(jnp.where(here[:, None], rest, 0))
    whole = jnp.concatenate([new, rest], 1)
    both = old @ whole
    return _Turn(
        p=step[k : 2 * k].T,
        w=jnp.where(look, 0, step[2 * k :]).T,
        whole=whole.T,
        inside=both.T @ inside @ both,
        moved=moved,
        size=size,
    )


def _columns(matrix: Array) -> tuple[Array, Array]:
    """An orthonormal basis of unit columns, and which of it there are."""
    there = jnp.ones(matrix.shape[1], bool)
    least = ROUNDING * float(jnp.finfo(matrix.dtype).eps)
    for _ in range(2):
        values, vectors = symmetric(matrix.T @ matrix)
        there = values > least
        shrink = jnp.where(there, jax.lax.rsqrt(jnp.where(there, values, 1)), 0)
        matrix = matrix @ (vectors * shrink[None])
    return matrix, there


def _sum(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *trees)


def _dense(apply: Operator, guess: PyTree) -> Pairs:
    """By the matrix itself, of a few parameters."""
    k = len(jax.tree.leaves(guess)[0])
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], guess))
    images = apply(jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype)))
    matrix = jax.vmap(lambda tree: ravel_pytree(tree)[0])(images)
    values, vectors = jnp.linalg.eigh(matrix)
    values, rows = values[::-1][:k], vectors[:, ::-1][:, :k].T
    images = jnp.matmul(rows, matrix, precision="highest")
    off = lengths(images - values[:, None] * rows)
    steps = jnp.zeros((), jnp.int32)
    return Pairs(values, jax.vmap(unravel)(rows), _relative(off, values), steps)


def _relative(off: Array, values: Array) -> Array:
    """Residuals relative to the largest value."""
    scale = jnp.max(jnp.abs(values))
    return off / jnp.maximum(scale, float(jnp.finfo(off.dtype).tiny))
