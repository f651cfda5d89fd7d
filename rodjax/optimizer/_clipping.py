"""How much of the present gradient an optimizer lets through."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.optimizer._clips import undone
from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._linear import LinearMap, Rest

# Nearer to one than this nothing is clipped: rounding, and epsilons.
NEAR_ONE = 1e-3


def let_through(
    dynamics: Dynamics, rest: Rest, linear: LinearMap, grad: PyTree, *, lr: PyTree
) -> PyTree:
    """The share of `grad` that moves each coordinate, 1 where nothing clips it.

    The step that is shown `grad`, over what the linear map of a vanishing gradient
    says of it, with second moments that both steps leave at the same values.
    """
    state, zero = rest.state, optax.tree.zeros_like(grad)
    step = lambda slow, grad: dynamics.respond(state._replace(slow=slow), grad, lr=lr)
    still = step(state.slow, zero)
    shown = step(undone(state.slow, still.slow, step(state.slow, grad).slow), grad)

    def share(shown: Array, still: Array, response: Array, g: Array) -> Array:
        told = response[..., 0] * g
        seen = jnp.where(jnp.isfinite(shown), shown - still, told)
        # The step is the difference of parameters, and has their rounding errors.
        blur = 8 * float(jnp.finfo(seen.dtype).eps)
        mean, near = _over(jnp.sum(seen * told), jnp.sum(told**2)), NEAR_ONE
        near += _over(blur * jnp.linalg.norm(still), jnp.linalg.norm(told))
        mean = jnp.where(jnp.abs(mean - 1) < near, 1, mean)
        sharp = blur * jnp.abs(still) < NEAR_ONE * jnp.abs(told)
        ratio = jnp.where(sharp, _over(seen, told), mean)
        return jnp.where(jnp.abs(ratio - 1) < NEAR_ONE, 1, jnp.maximum(ratio, 0))

    return jax.tree.map(share, shown.params, still.params, linear.response, grad)


def _over(x: Array, y: Array) -> Array:
    """x / y; 1 where y is zero."""
    return jnp.where(y == 0, 1, x / jnp.where(y == 0, 1, y))
