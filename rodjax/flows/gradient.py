"""Gradient flow and its corrections by backward error analysis: IGR and third order."""

import jax
import jax.numpy as jnp
import optax

from rodjax.curvature import hvp, third_derivative
from rodjax.dynamics import Dynamics, State
from rodjax.flows.base import Flow, alone
from rodjax.flows.scope import gradient_descent_start
from rodjax.stability import learning_rate


def gradient(dynamics: Dynamics) -> Flow:
    r"""Gradient flow, $\dot w = -\eta g$: gradient descent's limit of small steps.

    Time is in optimizer steps, so the learning rate is in the field. One step of
    gradient descent leaves it by $O(\eta^2)$. State: a `State`, as the optimizer's.

    **Raises** `ValueError` from `init` for any optimizer but gradient descent
    (a schedule is fine).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.gradient(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-1.0)) < 1e-4)
    True

    ```
    """
    return _backward_error(dynamics, 1, "gradient")


def igr(dynamics: Dynamics) -> Flow:
    r"""The flow of implicit gradient regularization (IGR).

    $\dot w = -\eta g - \tfrac{\eta^2}{2} H g$: gradient flow on $L + \tfrac{\eta}{4}
    |g|^2$, which one step of gradient descent leaves by $O(\eta^3)$. One gradient and
    one Hessian-vector product a call. Source: Barrett, Dherin, arXiv 2009.11162.

    **Raises** `ValueError` from `init` for any optimizer but gradient descent.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.igr(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-1.05)) < 1e-4)  # GD: 0.9^10 = e^-1.054
    True

    ```
    """
    return _backward_error(dynamics, 2, "igr")


def third_order(dynamics: Dynamics) -> Flow:
    r"""Gradient flow corrected to third order by backward error analysis.

    $\dot w = -\eta g - \tfrac{\eta^2}{2} H g - \eta^3 (\tfrac13 H^2 g + \tfrac1{12}
    T[g, g])$ with T the third derivative; one step of gradient descent leaves it by
    $O(\eta^4)$. One gradient, two Hessian-vector products and one contraction of T a
    call. Source: Rosca et al., arXiv 2302.01952 (with all terms of that order).

    **Raises** `ValueError` from `init` for any optimizer but gradient descent.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.third_order(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - 0.9**10) < 2e-4)
    True

    ```
    """
    return _backward_error(dynamics, 3, "third_order")


def half_step_earlier(y: State) -> State:
    """`y` at the time when the rate of a schedule is to be read.

    A step has the rate of its start: the mean, over its duration, of the schedule half
    a step earlier. Not before the start, where a schedule need not be defined.
    """
    return y._replace(clock=jax.tree.map(lambda t: jnp.maximum(t - 0.5, 0.0), y.clock))


def _backward_error(dynamics: Dynamics, order: int, name: str) -> Flow:
    def vector_field(t, y: State, lr) -> State:
        y = half_step_earlier(y) if order > 1 else y
        first = dynamics.increment(y, lr)
        f = field = first.params
        if order > 1:
            # With f = -eta g the corrections -f'f/2, f'f'f/3 and f''[f, f]/12.
            rate = learning_rate(dynamics, y, lr)
            once = hvp(dynamics.loss, y.params, f)
            field = optax.tree.add_scale(f, 0.5 * rate, once)
            if order > 2:
                twice = hvp(dynamics.loss, y.params, once)
                bent = third_derivative(dynamics.loss, y.params, f, f)
                field = optax.tree.add_scale(field, rate**2 / 3.0, twice)
                field = optax.tree.add_scale(field, -rate / 12.0, bent)
        return first._replace(phase=(field, *first.phase[1:]))

    return Flow(
        init=lambda start, lr, key: gradient_descent_start(dynamics, start, lr, name),
        vector_field=vector_field,
        centre=lambda y: y,
        observe=lambda y, lr: alone(y.params),
        dynamics=dynamics,
        evaluations=1,
        products=(0, 1, 3)[order - 1],
    )
