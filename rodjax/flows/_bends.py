"""Third derivatives along the few directions that are near the edge of stability."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from rodjax.flows._tracking import Tracked

# Directions whose eigenvalue of P^-1 H is below this are a step and more away from an
# edge of 2, even at 0.1 a step; their third derivatives are left out.
NEAR = 1.9

Slope = Callable[[PyTree], PyTree]


def third_derivatives(slope_of: Slope, point: PyTree, tracked: Tracked) -> PyTree:
    """T[u_i, u_j] for the directions that could be at the edge; zero for others.

    The pairs i, j in the order of a matrix [k, k], on a leading axis of k^2.

    They are the costliest part of the field, so their number is decided as it runs.
    """
    count = len(tracked.curvature)
    sizes = jnp.abs(tracked.curvature)
    # Gershgorin: what lies below NEAR even so is left out, with all that follow.
    reach = jnp.sum(sizes, 1) - jnp.diag(sizes) + jnp.diag(tracked.curvature)
    active = jnp.max(jnp.where(reach > NEAR, 1 + jnp.arange(count), 0))
    # What the loss closes over becomes an argument, to be differentiated in.
    slope_of = eqx.filter_closure_convert(slope_of, point)
    found = _bends(slope_of, point, tracked.directions, active)
    place = {pair: n for n, pair in enumerate(_pairs(count))}
    each = [(i, j) for i in range(count) for j in range(count)]
    index = jnp.asarray([place[min(pair), max(pair)] for pair in each])
    return jax.tree.map(lambda x: x[index], found)


def _pairs(count: int) -> list[tuple[int, int]]:
    """Those of the first few directions first, however few they are."""
    return [(i, j) for j in range(count) for i in range(j + 1)]


def _bend(slope_of: Slope, point: PyTree, u: PyTree, v: PyTree) -> PyTree:
    along = lambda x: jax.jvp(slope_of, (x,), (u,))[1]
    return jax.jvp(along, (point,), (v,))[1]


def _take(rows: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x: x[i], rows)


@eqx.filter_custom_jvp
def _bends(slope_of: Slope, point: PyTree, u: PyTree, active: Int[Array, ""]) -> PyTree:
    """The bends of all pairs of the first `active` directions, then zeros."""
    pairs = jnp.asarray(_pairs(len(jax.tree.leaves(u)[0])))

    def bend(n, bends):
        new = _bend(slope_of, point, *(_take(u, i) for i in pairs[n]))
        return jax.tree.map(lambda x, y: x.at[n].set(y), bends, new)

    blank = lambda x: jnp.zeros((len(pairs), *x.shape), x.dtype)
    found = jax.tree.map(blank, point)
    return jax.lax.fori_loop(0, active * (active + 1) // 2, bend, found)


@_bends.def_jvp
def _bends_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Of a loop of fixed length, in which a branch is skipped."""
    *parts, active = primals
    given = jax.tree.map(
        lambda t: t is not None, tangents[:3], is_leaf=lambda t: t is None
    )
    moving, fixed = eqx.partition(tuple(parts), given)
    pairs = jnp.asarray(_pairs(len(jax.tree.leaves(parts[2])[0])))

    def all_bends(moving):
        slope_of, point, u = eqx.combine(moving, fixed)

        def bend(n):
            there = lambda: _bend(slope_of, point, *(_take(u, i) for i in pairs[n]))
            nothing = lambda: jax.tree.map(jnp.zeros_like, point)
            return jax.lax.cond(pairs[n, 1] < active, there, nothing)

        return jax.lax.map(bend, jnp.arange(len(pairs)))

    return jax.jvp(all_bends, (moving,), (tangents[:3],))
