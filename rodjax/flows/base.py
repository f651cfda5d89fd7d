"""What every flow is: the same small NamedTuple of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.dynamics import Dynamics, State
from rodjax.window import Window, midpoint

#: The least oscillation relative to the parameters; see `seed_size`.
Seed = float | Callable[[Any], Any] | None


class Flow(NamedTuple):
    """A continuous-time model of an optimizer; time is in optimizer steps.

    - `init(start, lr, key) -> y`: the flow's state, a pytree of floats, from
      parameters (from scratch) or from a `Window` of a discrete run. `key` seeds what
      must be random, such as the direction of the first oscillation.
    - `vector_field(t, y, lr) -> dy/dt`: pure; any diffrax solver takes it.
    - `centre(y) -> State`: the optimizer state at the centre; `.params` are what the
      flow predicts for the midpoint of the iterates.
    - `observe(y, lr) -> (ends, report)`: `ends` are parameters with a leading axis, the
      points between which the flow says the iterates jump; their mean loss is the
      predicted time-averaged loss. `report` holds named scalars that only this flow can
      tell, recorded beside the metrics; mostly `{}`.
    - `dynamics`: the optimizer and loss that it models.
    - `evaluations`: update-map or gradient evaluations in one call of the vector field.
    - `products`: products with the Hessian or a derivative of it in one call; NaN where
      their number depends on the problem.
    - `offset`: 0 where the centre is the second-order midpoint at t, 1/2 where it is
      the half-step midpoint at t + 1/2.
    """

    init: Callable[[PyTree | Window, PyTree, Array], Any]
    vector_field: Callable[[Any, Any, PyTree], Any]
    centre: Callable[[Any], State]
    observe: Callable[[Any, PyTree], tuple[PyTree, dict[str, Array]]]
    dynamics: Dynamics
    evaluations: int
    products: float = 0
    offset: float = 0.0


def shift(state: State, phase: PyTree, scale: float | Array = 1.0) -> State:
    """`state` with `scale * phase` added to its phase part."""
    moved = jax.tree.map(lambda z, d: z + scale * d, state.phase, phase)
    return state._replace(phase=moved)


def half_step_back(y: State, field: State) -> State:
    r"""$y - f(y)/2$, where the vector field of a unit-step map is to be evaluated.

    One correction by backward error analysis, without derivatives: the flow whose
    time-1 map is $y + f(y)$ is $f - f'f/2$ to second order, and so is $f(y - f(y)/2)$,
    which needs no derivative of the optimizer (whose square root of a second moment has
    none at zero). Second moments, which grow from nothing, are not taken below zero.
    """
    back = jax.tree.map(lambda a, f: a - 0.5 * f, y, field)
    return back._replace(slow=jax.tree.map(lambda s: jnp.maximum(s, 0.0), back.slow))


def centre_of(dynamics: Dynamics, start: PyTree | Window, lr: PyTree) -> State:
    """Where a flow of midpoints starts: a window's own, or the initial state."""
    if isinstance(start, Window):
        return midpoint(start)
    return dynamics.init(start, lr)


def seed_size(
    seed: Seed,
) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    """(params, lr) -> the least size of an oscillation, `seed` relative to their norm.

    `None` stands for the dtype's epsilon, which is what rounding gives a real run; a
    function takes `lr`, so that a sweep may vary the seed.

    **Raises** `ValueError` if `seed` is a negative number.
    """
    if seed is not None and not callable(seed) and seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")

    def least(params: PyTree, lr: PyTree) -> Array:
        norm = optax.tree.norm(params)
        if seed is None:
            return float(jnp.finfo(norm.dtype).eps) * norm
        return jnp.asarray(seed(lr) if callable(seed) else seed, norm.dtype) * norm

    return least


def alone(params: PyTree) -> tuple[PyTree, dict[str, Array]]:
    """What a flow without oscillation observes: its centre."""
    return stack(params), {}


def stack(*trees: PyTree) -> PyTree:
    """Stack trees on a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
