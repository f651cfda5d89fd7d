"""The largest eigenvalue of an operator, with three vectors between two products.

Conjugate gradients up the Rayleigh quotient (Bradbury and Fletcher, Numer. Math. 9,
1966). They take as many products as the locally optimal ones of `_lobpcg`, which hold
two vectors more.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from rodjax.linalg._rows import ROUNDING
from rodjax.linalg._trees import alike, dot, over, scattered, unit

# What the next product is for.
VECTOR, DIRECTION, LOOK = range(3)
# Cosine of a step, above which the next direction is made conjugate to the last.
LEAST = 0.1
# Levels of rounding, above which a residual needs no product of its own.
SURE = 100

_apart = jax.lax.optimization_barrier


class Ascent(NamedTuple):
    """Between two products, of which the next is that with `p`, of unit length.

    - `VECTOR`: p is the vector itself.
    - `DIRECTION`: p is across the vector `x`, and conjugate to what moved that last;
      `ax` is what the operator makes of x.
    - `LOOK`: conjugate gradients for (value - A) y = v across x, whose direction is
      `length` times p; `ax` is what is left of v, `left` its square, v itself the first
      direction. If A is larger than `value` anywhere across x, then soon along a p.

    `value` and `off` = |A x - value x| are of x; `size` is that of the operator, as far
    as it was seen; `looks` are the products of this look. All that the operator makes
    is in units of `scale`.
    """

    x: PyTree
    ax: PyTree
    p: PyTree
    stage: Int[Array, ""]
    value: Float[Array, ""]
    off: Float[Array, ""]
    size: Float[Array, ""]
    scale: Float[Array, ""]
    length: Float[Array, ""]
    left: Float[Array, ""]
    looks: Int[Array, ""]
    steps: Int[Array, ""]
    unfinished: Bool[Array, ""]


def ascend(
    operator: Callable[[PyTree], PyTree],
    guess: PyTree,
    accuracy: float,
    most: int,
    looks: int,
) -> Ascent:
    """To the largest eigenvalue, from `guess`, whose leaves have one dtype.

    Until the residual is below `accuracy` or at the level of rounding and `looks`
    products across the vector find nothing larger, or for `most` products in all.
    """
    leaves = jax.tree.leaves(guess)
    dtype, n = jnp.result_type(*leaves), sum(x.size for x in leaves)
    level = ROUNDING * float(jnp.finfo(dtype).eps)

    def noise(seed: Array) -> PyTree:
        return jax.tree.map(lambda x: x / n**0.5, scattered(guess, seed))

    # Sums are of products of two arrays that there are: of others the compiler would
    # make arrays. All numbers come before what they are for, and each array is changed
    # once, so that it gives its place in memory to what it becomes.
    def step(now: Ascent) -> Ascent:
        x, ax, p = now.x, now.ax, now.p
        ap = _apart(alike(operator(p), p))
        scale = jnp.where(now.steps == 0, _largest(ap), now.scale)
        ap = _apart(over(ap, scale))
        across, along = dot(x, ap), dot(p, ap) / dot(p, p)
        # How far the operator is below along p: if it is not, p is the better vector.
        above = now.value + level * now.size
        below = above - along
        look = (now.stage == LOOK) & ~(below < 0)
        alone = (now.stage != DIRECTION) & ~look
        climb = ~look & ~alone
        seen = jnp.maximum(jnp.abs(along), jnp.abs(across))
        size = jnp.maximum(now.size, jnp.where(look, 0, seen))

        # The vector, and what is left of v.
        c, s, radius = _turn(0.5 * (now.value - along), across)
        c, s = _either(look, 1, alone, 0, c), _either(look, 0, alone, 1, s)
        x = _apart(_sum((c, x), (s, p)))
        first = look & (now.looks == 0)
        reach = jnp.where(look, now.left / (now.length * below), 0)
        ax = _sum(
            (jnp.where(first, 0, c), ax),
            (s + reach, ap),
            (jnp.where(first, 1.0, 0.0) - reach * above, p),
            (-reach * across, x),
        )
        ax = _apart(ax)

        # The residual, and the part of the last direction in a conjugate one.
        inner, square = dot(x, ax), dot(ax, ax)
        value = jnp.where(look, now.value, inner / dot(x, x))
        bend = dot(ax, ap) - s * square - value * (dot(x, ap) - s * inner)
        bend = bend / (c * c * jnp.maximum(2 * radius, level * size))
        bend = _apart(jnp.where(climb & (c > LEAST), bend, 0))
        rest = _apart(_sum((1, ax), (jnp.where(look, 0, -value), x)))
        left = dot(rest, rest)
        off = jnp.where(look, now.off, jnp.sqrt(left))

        steps = now.steps + 1
        # Well within: the value is off by the square of it, over the gap.
        goal = jnp.maximum(0.4 * accuracy * jnp.abs(value), level * size)
        sure = alone | (off > SURE * level * size)
        begin = ~look & sure & (off <= goal)
        check = climb & ~begin & (~(off > goal) | (steps >= most - 1))

        inverse = jnp.where(off > 0, 1 / off, 0)
        bend = jnp.where(look, now.length * left / now.left, bend * inverse)
        p = _sum(
            (_either(look, 1, check, 0, inverse), rest),
            (jnp.where(check, 0, bend), p),
            (jnp.where(check, 1, -bend * s), x),
        )
        p = _once(begin, lambda p: jax.tree.map(jnp.add, p, noise(steps)), p)
        overlap = jnp.where(check, 0, dot(x, p))
        length = jnp.sqrt(dot(p, p) - overlap**2)
        inverse = jnp.where(length > 0, 1 / length, 0)
        p = _sum((inverse, p), (-inverse * overlap, x))

        more = ~look | ((below > 0) & (now.looks + 1 < looks))
        more &= ~alone | begin | ((off > goal) & (steps < most - 1))
        return Ascent(
            x,
            ax,
            p,
            stage=_either(
                look | begin, LOOK, check, VECTOR, jnp.full_like(now.stage, DIRECTION)
            ),
            value=value,
            off=off,
            size=size,
            scale=scale,
            length=jnp.where(begin, 1, length),
            left=jnp.where(begin, 1, left),
            looks=jnp.where(look, now.looks + 1, 0),
            steps=steps,
            unfinished=more & (steps < most),
        )

    # Noise keeps an exact eigenvector from hiding those above it.
    zero, none = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
    start = jax.tree.map(lambda x, y: x + accuracy * y, unit(guess), noise(none))
    start = unit(start)
    # Not of zeros alone, which would be there before `start` is.
    nothing = jax.tree.map(lambda x: 0 * x, start)
    numbers = dict.fromkeys(("value", "off", "size", "scale", "length", "left"), zero)
    counts = dict.fromkeys(("stage", "looks", "steps"), none)
    first = Ascent(
        nothing, nothing, start, **numbers, **counts, unfinished=jnp.asarray(True)
    )
    top = jax.lax.while_loop(lambda now: now.unfinished, step, first)
    # Whatever rounding has done to its length.
    x = over(top.x, jnp.sqrt(dot(top.x, top.x)))
    return top._replace(x=x, value=top.scale * top.value, off=top.scale * top.off)


def _turn(half: Array, across: Array) -> tuple[Array, Array, Array]:
    """To the largest eigenvalue of [[half, across], [across, -half]]: cosine, sine.

    And the eigenvalue. The cosine is not negative.
    """
    radius = jnp.hypot(half, across)
    steep, flat = radius + jnp.abs(half), jnp.abs(across)
    length = jnp.hypot(steep, flat)
    steep = jnp.where(length > 0, steep / length, 1)
    flat = jnp.where(length > 0, flat / length, 0)
    up, sign = half >= 0, jnp.where(across < 0, -1, 1)
    return jnp.where(up, steep, flat), sign * jnp.where(up, flat, steep), radius


def _largest(tree: PyTree) -> Array:
    """The largest absolute entry; one if all are zero."""
    size = jnp.max(
        jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)])
    )
    return jnp.where(size > 0, size, 1)


def _either(
    one: Array,
    x: Array | float,
    other: Array,
    y: Array | float,
    neither: Array,
) -> Array:
    return jnp.where(one, x, jnp.where(other, y, neither))


def _once(when: Array, change: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """`change`, if at all: where a branch would copy, a loop of one turn does not."""
    turn = lambda now: (change(now[0]), jnp.zeros_like(now[1]))
    return jax.lax.while_loop(lambda now: now[1], turn, (tree, when))[0]


def _sum(*parts: tuple[Array | float, PyTree]) -> PyTree:
    """Of trees, each times a number."""
    by, trees = zip(*parts, strict=True)
    # Computed once, and not again wherever a leaf is.
    by = _apart(tuple(map(jnp.asarray, by)))

    def each(*leaves: Array) -> Array:
        total = by[0] * leaves[0]
        for c, x in zip(by[1:], leaves[1:], strict=True):
            total = total + c * x
        return total

    return jax.tree.map(each, *trees)
