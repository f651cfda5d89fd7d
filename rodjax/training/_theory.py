"""Whether linear theory has a threshold for an optimizer, or why it has none."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from rodjax.optimizer import (
    NOT_APART,
    Dynamics,
    Same,
    dynamics,
    first_edge,
    unit_preconditioner,
)

# Axes of parameters to try an optimizer on; Adafactor factors from 128 on.
LONG = 128
# A gradient that no clipping reaches, and by how much its double may be answered by
# other than the double, relative to it.
SMALL, BENT = 1e-6, 0.05


def no_threshold(optimizer: optax.GradientTransformation, params: PyTree) -> str | None:
    """Why the optimizer has no threshold of its own on such parameters, if so."""
    same = Same(optimizer)
    if same.traced:
        return (
            "it was made of a traced learning rate, so that it cannot be tried out: "
            "make it by optax.inject_hyperparams and set the rate in its state"
        )
    leaves, structure = jax.tree.flatten(params)
    short = lambda shape: tuple(min(n, LONG + i % 2) for i, n in enumerate(shape))
    single = lambda x: np.promote_types(jnp.result_type(x), np.float32)
    return _reason(same, structure, tuple((short(x.shape), single(x)) for x in leaves))


@functools.lru_cache(maxsize=64)
def _reason(
    same: Same, structure: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]
) -> str | None:
    squares = lambda w: [jnp.sum(x * x) for x in jax.tree.leaves(w)]
    loss = lambda w: jnp.sum(jnp.stack(squares(w)))
    of = dynamics(same.thing, loss)

    def look(params: PyTree) -> tuple[list[Array], Array]:
        # A schedule may be zero at its end, or at its beginning.
        edges = [first_edge(of, params, step=step) for step in (None, 1)]
        still = optax.tree.zeros_like(params)
        return [edge.curvature for edge in edges], _is_linear(of, still)

    full = structure.unflatten([np.full(s, 0.1, d) for s, d in shapes])
    with jax.debug_nans(False):
        try:
            # Compiled and called by itself: on numbers, since what is traced cannot be
            # looked into, though `init` may be.
            found, linear = jax.jit(look).lower(full).compile()(full)
        except ValueError as error:
            return str(error).strip().splitlines()[0]
    if any(math.isnan(curvature) for curvature in found):
        return NOT_APART
    if not any(math.isfinite(curvature) for curvature in found):
        return "no curvature makes its steps unstable, as where a rate is zero"
    if not linear:
        return (
            "its steps do not grow with the gradient, as where they go by its sign or "
            "are normalized"
        )
    return None


def _is_linear(of: Dynamics, params: PyTree) -> Array:
    """Whether twice a small gradient moves it twice as far, second moments frozen."""
    state = unit_preconditioner(of, of.init(params))
    draw = optax.tree.random_like(jax.random.key(0), params)

    def moved(by: ArrayLike) -> PyTree:
        return of.respond(state, optax.tree.scale(by * SMALL, draw)).params

    none, one, two = (moved(by) for by in (0.0, 1.0, 2.0))
    bend = optax.tree.max(
        jax.tree.map(lambda x, y, z: jnp.abs(z - 2 * y + x), none, one, two)
    )
    far = optax.tree.max(jax.tree.map(lambda x, y: jnp.abs(y - x), none, two))
    return jnp.asarray(bend) <= BENT * jnp.asarray(far)
