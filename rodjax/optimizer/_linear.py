"""The update map of an optimizer on a quadratic, coordinate by coordinate."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.linalg import random_direction
from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._state import State, slots_of

# A gradient whose square single precision still tells from nothing.
NEAR_REST = 1e-18


class LinearMap(NamedTuple):
    """The update map on a quadratic, linearized at rest with a frozen slow state.

    Per coordinate, for each leaf [...] of the parameters, with n the number of slots
    that a coordinate of it has in the phase (itself, its momentum, ...):

    - `free`: [..., n, n], the map without curvature.
    - `response`: [..., n], how the slots answer to a unit gradient.

    With curvature l the map is `free + l * response e_0^T`: affine in l, and so is
    every determinant of it.
    """

    free: PyTree
    response: PyTree

    def at(self, curvature: PyTree) -> PyTree:
        """The map [..., n, n] at these curvatures, one for each coordinate."""
        return jax.tree.map(
            lambda free, response, c: free.at[..., 0].add(c[..., None] * response),
            self.free,
            self.response,
            curvature,
        )


def linearize(dynamics: Dynamics, state: State, *, lr: PyTree = None) -> LinearMap:
    """The linear map of every coordinate at `state`, for curvature along it alone.

    Exact for optimizers that act on each coordinate through a preconditioner that a
    vanishing gradient does not move. NaN where `update` has no derivative at zero
    gradient (trust ratios, orthogonalized updates).

    **Raises** `ValueError` if a first moment mirrors no parameter, as in an optimizer
    of flattened parameters.
    """
    return linear_of(at_rest(dynamics, state, lr=lr))


class Rest(NamedTuple):
    """The update map about its rest.

    - `answer(phase, gradient) -> phase`: its linear part, by leaves.
    - `slots`: of every leaf of the parameters, which leaves of the phase are of it.
    - `state`: the state at rest, `slow` its second moments after a step.
    """

    answer: Callable[[list[Array], list[Array]], list[Array]]
    slots: list[list[int]]
    state: State
    slow: PyTree


def at_rest(dynamics: Dynamics, state: State, *, lr: PyTree) -> Rest:
    """Without momentum, and with second moments that a step leaves as `state` has them.

    The optimizer moves its second moment before it divides by it; frozen therefore
    means frozen at the value it divides by.
    """
    # Next to nothing, where norms have a derivative and at nothing they have none.
    phase = (state.params, optax.tree.full_like(state.phase[1], NEAR_REST))
    no_grad = optax.tree.full_like(state.params, NEAR_REST)
    # A zero second moment has no derivative of its root, and its coordinate no
    # gradient: any tiny value serves whose square, which derivatives contain, is none.
    tiny = lambda s: max(1e-30, 10 * float(jnp.finfo(s.dtype).tiny) ** 0.5)
    slow = jax.tree.map(lambda s: jnp.maximum(s, tiny(s)), state.slow)
    rest = state._replace(phase=phase, slow=slow)
    if jax.tree.leaves(slow):
        after = dynamics.respond(rest, no_grad, lr=lr).slow
        slow = jax.tree.map(lambda s, a: jnp.where(a > 0, s * (s / a), s), slow, after)
        rest = rest._replace(slow=slow)

    def respond(phase: PyTree, grad: PyTree) -> tuple[PyTree, PyTree]:
        new = dynamics.respond(rest._replace(phase=phase), grad, lr=lr)
        return new.phase, new.slow

    # Once, for all directions.
    (_, kept), linear = jax.linearize(respond, phase, no_grad)

    def answer(d_phase: list[Array], d_grad: list[Array]) -> list[Array]:
        tangents = (
            jax.tree.unflatten(jax.tree.structure(phase), d_phase),
            jax.tree.unflatten(jax.tree.structure(no_grad), d_grad),
        )
        return jax.tree.leaves(linear(*tangents)[0])

    return Rest(answer, slots_of(state), rest, kept)


def linear_of(rest: Rest) -> LinearMap:
    """The map of every coordinate by itself."""
    slots, phase = rest.slots, jax.tree.leaves(rest.state.phase)
    outside, structure = jax.tree.flatten(rest.state.params)

    def column(i: int | None) -> list[Array]:
        """How all slots answer to a one in the i-th of each, or in the gradient."""
        ours = {s[i] for s in slots if i is not None and i < len(s)}
        one = [jnp.full_like(x, float(k in ours)) for k, x in enumerate(phase)]
        grad = [jnp.full_like(x, float(i is None)) for x in outside]
        return rest.answer(one, grad)

    columns = [column(i) for i in range(max(map(len, slots)))]
    gather = lambda column, slot: jnp.stack([column[k] for k in slot], -1)
    free = [
        jnp.stack([gather(c, slot) for c in columns[: len(slot)]], -1) for slot in slots
    ]
    forced = column(None)
    response = [gather(forced, slot) for slot in slots]
    return LinearMap(structure.unflatten(free), structure.unflatten(response))


def mixing(rest: Rest, linear: LinearMap, slow: PyTree) -> Array:
    """How far the map is from one of each coordinate by itself, relative to it; [].

    Tried on one random direction, in which no two coordinates are alike; and how far
    second moments are from staying at `slow`.
    """
    phase = jax.tree.leaves(random_direction(jax.random.key(0), rest.state.phase))
    grad = jax.tree.leaves(random_direction(jax.random.key(1), rest.state.params))
    seen = rest.answer(phase, grad)
    apart, size, moved = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    maps = zip(rest.slots, *map(jax.tree.leaves, (*linear, grad)), strict=True)
    for slot, free, response, g in maps:
        x = jnp.stack([phase[k] for k in slot], -1)
        told = jnp.einsum("...ij,...j->...i", free, x) + response * g[..., None]
        found = jnp.stack([seen[k] for k in slot], -1)
        apart = jnp.maximum(apart, jnp.max(jnp.abs(found - told), initial=0.0))
        size = jnp.maximum(size, jnp.max(jnp.abs(found), initial=0.0))
    for s, s0 in zip(*map(jax.tree.leaves, (rest.slow, slow)), strict=True):
        moved = jnp.maximum(moved, jnp.max(jnp.abs(s / s0 - 1), initial=0.0))
    # Less what the narrowest dtype cannot tell.
    floats = [x.dtype for x in jax.tree.leaves((rest.state.phase, slow))]
    blur = max(float(jnp.finfo(dtype).eps) for dtype in floats)
    return jnp.maximum(apart / size, moved) - blur
