"""The flow of implicit gradient regularization."""

from rodjax.flows._backward_error import backward_error
from rodjax.flows._flow import Flow
from rodjax.optimizer import Dynamics


def igr(dynamics: Dynamics) -> Flow:
    r"""The flow of implicit gradient regularization (IGR).

    $\dot w = -\eta g - \tfrac{\eta^2}{2} H g$: gradient flow on $L + \tfrac{\eta}{4}
    |g|^2$, which one step of gradient descent leaves by $O(\eta^3)$. One gradient and
    one Hessian-vector product a call. Source: Barrett, Dherin, arXiv 2009.11162.

    **Raises** `ValueError` from `init` for any optimizer but gradient descent.

    Memory of `integrate`, beyond the gradient's own: 5.5 copies of the parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.igr(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-1.05)) < 1e-4)  # GD: 0.9^10 = e^-1.054
    True

    ```
    """
    return backward_error(dynamics, 2, "igr")
