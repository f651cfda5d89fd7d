"""Gradient flow and its corrections by backward error analysis, to any of 3 orders."""

import jax
import jax.numpy as jnp
import optax

from rodjax.curvature import hvp, third_derivative
from rodjax.flows._flow import Flow
from rodjax.flows._scope import gradient_descent_start
from rodjax.optimizer import Dynamics, State, learning_rate


def half_step_earlier(y: State) -> State:
    """`y` at the time when the rate of a schedule is to be read.

    A step has the rate of its start: the mean, over its duration, of the schedule half
    a step earlier. Not before the start, where a schedule need not be defined.
    """
    return y._replace(clock=jax.tree.map(lambda t: jnp.maximum(t - 0.5, 0.0), y.clock))


def backward_error(dynamics: Dynamics, order: int, name: str) -> Flow:
    def vector_field(t, y: State, lr) -> State:
        y = half_step_earlier(y) if order > 1 else y
        first = dynamics.increment(y, lr=lr)
        f = field = first.params
        if order > 1:
            # With f = -eta g the corrections -f'f/2, f'f'f/3 and f''[f, f]/12.
            rate = learning_rate(dynamics, y, lr=lr)
            once = hvp(dynamics.loss, y.params, f)
            field = optax.tree.add_scale(f, 0.5 * rate, once)
            if order > 2:
                twice = hvp(dynamics.loss, y.params, once)
                bent = third_derivative(dynamics.loss, y.params, f, f)
                field = optax.tree.add_scale(field, rate**2 / 3.0, twice)
                field = optax.tree.add_scale(field, -rate / 12.0, bent)
        return first._replace(phase=(field, *first.phase[1:]))

    return Flow(
        init=lambda start, *, lr, key: gradient_descent_start(
            dynamics, start, name, lr=lr
        ),
        vector_field=vector_field,
        dynamics=dynamics,
        evaluations=1,
        products=(0, 1, 3)[order - 1],
    )
