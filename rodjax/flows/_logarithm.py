"""The complex logarithm of the principal flow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def principal_coefficient(
    x: Float[Array, "*n"] | Complex[Array, "*n"], least: float = 0.0
) -> Complex[Array, "*n"]:
    r"""$\log(1 - x) / x$ at $x = \eta\lambda$: the principal flow's factor of $\eta g$.

    -1 at x = 0, where gradient flow has it throughout; $\ln|1 - x|/x + i\pi/x$ beyond
    x = 1; its real part is positive beyond x = 2. Rosca et al., arXiv 2302.01952.

    - `least`: the least |1 - x|, which keeps the logarithm finite at x = 1.

    The branch is cut along the negative imaginary axis of 1 - x, so that rounding
    beside the negative reals, where gradient descent flips signs, does not change it.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> x = jnp.array([0.0, 1.5, 2.5])
    >>> rj.flows.principal_coefficient(x).real.round(3).tolist()
    [-1.0, -0.462, 0.162]

    ```
    """
    if not jnp.iscomplexobj(x):
        x = jax.lax.complex(x, jnp.zeros_like(x))
    rest = 1.0 - x
    # Near zero 1 - x has lost digits of x; |1 - x|^2 - 1 need not.
    near = jnp.abs(x) < 0.5
    excess = jnp.real(x) * (jnp.real(x) - 2.0) + jnp.imag(x) ** 2
    close = 0.5 * jnp.log1p(jnp.where(near, excess, 0.0))
    far = jnp.log(jnp.maximum(jnp.abs(rest), least))
    angle = jnp.angle(rest)
    turned = jnp.where(angle < -0.5 * jnp.pi, angle + 2.0 * jnp.pi, angle)
    log = jax.lax.complex(jnp.where(near, close, far), turned)
    small = jnp.abs(x) < 1e-3
    safe = jnp.where(small, 1.0, x)
    series = -1.0 - x * (1 / 2 + x * (1 / 3 + x * (1 / 4 + x / 5)))
    return jnp.where(small, series, log / safe)
