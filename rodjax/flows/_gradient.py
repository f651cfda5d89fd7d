"""Gradient flow: gradient descent's limit of small steps."""

from rodjax.flows._backward_error import backward_error
from rodjax.flows._flow import Flow
from rodjax.optimizer import Dynamics


def gradient(dynamics: Dynamics) -> Flow:
    r"""Gradient flow, $\dot w = -\eta g$: gradient descent's limit of small steps.

    Time is in optimizer steps, so the learning rate is in the field. One step of
    gradient descent leaves it by $O(\eta^2)$. State: a `State`, as the optimizer's.

    **Raises** `ValueError` from `init` for any optimizer but gradient descent
    (a schedule is fine).

    Memory of `integrate`, beyond the gradient's own: 3.4 copies of the parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.gradient(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-1.0)) < 1e-4)
    True

    ```
    """
    return backward_error(dynamics, 1, "gradient")
