"""The naive continuous-time limit: the baseline that EoS breaks."""

from rodjax.flows._flow import Flow
from rodjax.optimizer import Dynamics


def stable(dynamics: Dynamics) -> Flow:
    r"""The stable flow: the optimizer without its oscillation.

    $dz/dt = F(z)$ with $F(z) = \Phi(z) - z$ the increment of the update map on the
    whole optimizer state, time in optimizer steps (Cohen et al., arXiv 2410.24206,
    call it so). It follows the optimizer to first order in the learning rate below
    the stability threshold and leaves it at the edge of stability.

    The flow's state is a `State`: phase, slow and clock parts as in the optimizer.

    Memory of `integrate`, beyond the gradient's own: 3.4 copies of the parameters
    without momentum, 8.4 with Adam.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> path = rj.integrate(rj.flows.stable(sgd), jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-1.0)) < 1e-4)
    True

    ```
    """

    return Flow(
        dynamics=dynamics,
        vector_field=lambda t, y, lr: dynamics.increment(y, lr=lr),
    )
