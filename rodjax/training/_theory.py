"""Whether linear theory has a threshold for an optimizer, or why it has none."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rodjax.optimizer import (
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
    single = lambda x: jnp.promote_types(jnp.result_type(x), jnp.float32)
    return _reason(same, structure, tuple((short(x.shape), single(x)) for x in leaves))


@functools.lru_cache(maxsize=64)
def _reason(
    same: Same, structure: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]
) -> str | None:
    squares = lambda w: [jnp.sum(x * x) for x in jax.tree.leaves(w)]
    loss = lambda w: jnp.sum(jnp.stack(squares(w)))
    full = lambda value: structure.unflatten([jnp.full(s, value, d) for s, d in shapes])
    # On numbers, since what is traced cannot be looked into.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        of = dynamics(same.thing, loss)
        try:
            # A schedule may be zero at its end, or at its beginning.
            edges = [first_edge(of, full(0.1), step=step) for step in (None, 1)]
            linear = _is_linear(of, full(0.0))
        except ValueError as error:
            return str(error).strip().splitlines()[0]
    if not any(math.isfinite(edge.curvature) for edge in edges):
        return "no curvature makes its steps unstable, as where a rate is zero"
    if not linear:
        return (
            "its steps do not grow with the gradient, as where they go by its sign or "
            "are normalized"
        )
    return None


def _is_linear(of: Dynamics, params: PyTree) -> bool:
    """Whether twice a small gradient moves it twice as far, second moments frozen."""
    state = unit_preconditioner(of, of.init(params))
    draw = optax.tree.random_like(jax.random.key(0), params)

    @jax.jit
    def moved(by: ArrayLike) -> PyTree:
        return of.respond(state, optax.tree.scale(by * SMALL, draw)).params

    none, one, two = (moved(by) for by in (0.0, 1.0, 2.0))
    bend = optax.tree.max(
        jax.tree.map(lambda x, y, z: jnp.abs(z - 2 * y + x), none, one, two)
    )
    far = optax.tree.max(jax.tree.map(lambda x, y: jnp.abs(y - x), none, two))
    return bool(jnp.asarray(bend) <= BENT * jnp.asarray(far))
