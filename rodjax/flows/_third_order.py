"""Gradient flow corrected to third order."""

from rodjax.flows._backward_error import backward_error
from rodjax.flows._flow import Flow
from rodjax.optimizer import Dynamics


def third_order(dynamics: Dynamics) -> Flow:
    r"""Gradient flow corrected to third order by backward error analysis.

    $\dot w = -\eta g - \tfrac{\eta^2}{2} H g - \eta^3 (\tfrac13 H^2 g + \tfrac1{12}
    T[g, g])$ with T the third derivative; one step of gradient descent leaves it by
    $O(\eta^4)$. One gradient, two Hessian-vector products and one contraction of T a
    call. Source: Rosca et al., arXiv 2302.01952 (with all terms of that order).

    **Raises** `ValueError` from `init` for any optimizer but gradient descent.

    Memory of `integrate`, beyond the gradient's own: 10 copies of the parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.third_order(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - 0.9**10) < 2e-4)
    True

    ```
    """
    return backward_error(dynamics, 3, "third_order")
