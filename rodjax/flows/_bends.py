"""Third derivatives along the few directions that are near the edge of stability."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rodjax.flows._tracking import Tracked

# Directions whose eigenvalue of P^-1 H is below this are a step and more away from an
# edge of 2, even at 0.1 a step; their third derivatives are left out.
NEAR = 1.9

Slope = Callable[[Float[Array, " d"]], Float[Array, " d"]]


def third_derivatives(
    slope_of: Slope, point: Float[Array, " d"], tracked: Tracked
) -> Float[Array, "k k d"]:
    """T[u_i, u_j] for the directions that could be at the edge; zero for others.

    They are the costliest part of the field, so their number is decided as it runs.
    """
    count = len(tracked.directions)
    sizes = jnp.abs(tracked.curvature)
    # Gershgorin: what lies below NEAR even so is left out, with all that follow.
    reach = jnp.sum(sizes, 1) - jnp.diag(sizes) + jnp.diag(tracked.curvature)
    active = jnp.max(jnp.where(reach > NEAR, 1 + jnp.arange(count), 0))
    # What the loss closes over becomes an argument, to be differentiated in.
    slope_of = eqx.filter_closure_convert(slope_of, point)
    found = _bends(slope_of, point, tracked.directions, active)
    place = {pair: n for n, pair in enumerate(_pairs(count))}
    index = [[place[min(i, j), max(i, j)] for j in range(count)] for i in range(count)]
    return found[jnp.asarray(index)]


def _pairs(count: int) -> list[tuple[int, int]]:
    """Those of the first few directions first, however few they are."""
    return [(i, j) for j in range(count) for i in range(j + 1)]


def _bend(
    slope_of: Slope,
    point: Float[Array, " d"],
    u: Float[Array, " d"],
    v: Float[Array, " d"],
) -> Float[Array, " d"]:
    along = lambda x: jax.jvp(slope_of, (x,), (u,))[1]
    return jax.jvp(along, (point,), (v,))[1]


@eqx.filter_custom_jvp
def _bends(
    slope_of: Slope,
    point: Float[Array, " d"],
    u: Float[Array, "k d"],
    active: Int[Array, ""],
) -> Float[Array, "pairs d"]:
    """The bends of all pairs of the first `active` directions, then zeros."""
    first, second = jnp.asarray(_pairs(len(u))).T

    def bend(n, bends):
        return bends.at[n].set(_bend(slope_of, point, u[first[n]], u[second[n]]))

    found = jnp.zeros((len(first), point.size), point.dtype)
    return jax.lax.fori_loop(0, active * (active + 1) // 2, bend, found)


@_bends.def_jvp
def _bends_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Of a loop of fixed length, in which a branch is skipped."""
    *parts, active = primals
    given = jax.tree.map(
        lambda t: t is not None, tangents[:3], is_leaf=lambda t: t is None
    )
    moving, fixed = eqx.partition(tuple(parts), given)
    first, second = jnp.asarray(_pairs(len(parts[2]))).T

    def all_bends(moving):
        slope_of, point, u = eqx.combine(moving, fixed)

        def bend(n):
            there = lambda: _bend(slope_of, point, u[first[n]], u[second[n]])
            return jax.lax.cond(second[n] < active, there, lambda: 0 * point)

        return jax.lax.map(bend, jnp.arange(len(first)))

    return jax.jvp(all_bends, (moving,), (tangents[:3],))
