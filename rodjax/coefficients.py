"""Stability coefficients: how gradient descent moves along Hessian eigenvectors."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Complex, Float

from rodjax.curvature import hessian_eigenpairs, starting_directions
from rodjax.dynamics import Dynamics
from rodjax.stability import has_momentum, learning_rate
from rodjax.trajectory import Metric


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
    >>> rj.coefficients.principal_coefficient(x).real.round(3).tolist()
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


def stability_coefficients(
    dynamics: Dynamics, k: int, *, tol: float | None = None
) -> Metric:
    r"""Metric: how gradient descent moves along each of the k top eigenvectors.

    `stability_coefficient_1`, ... are the real parts of $\frac{\log(1 -
    \eta\lambda_i)}{\eta\lambda_i} (g \cdot u_i)$ at the centre, with the sign of $u_i$
    such that $g \cdot u_i \ge 0$: negative where the direction is descended, positive,
    beyond $\eta\lambda_i = 2$, where it is climbed. `stability_residual` is the largest
    of the eigenpairs'. For `metrics=` of `integrate` and `descend`, along any
    trajectory of gradient descent. Source: Rosca et al., arXiv 2302.01952.

    **Raises** `ValueError`, on use, if k is below 1 or above the number of parameters,
    or if the optimizer has momentum or a preconditioner.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.0), lambda w: 0.5 * (2.5 * w[0]**2 + w[1]**2))
    >>> metric = rj.stability_coefficients(sgd, 1)
    >>> run = rj.descend(sgd, jnp.array([1.0, 0.0]), 1, metrics=[metric])
    >>> round(float(run.metrics["stability_coefficient_1"][0]), 3)  # ln 1.5 / 2.5 * 2.5
    0.405

    ```
    """

    def update(snapshot, guess, lr):
        if has_momentum(snapshot.centre) or jax.tree.leaves(snapshot.centre.slow):
            raise ValueError(
                "stability_coefficients describes gradient descent only. For other "
                "optimizers record rodjax.spectrum(dynamics, k)"
            )
        params = snapshot.centre.params
        pairs = hessian_eigenpairs(dynamics.loss, params, k, guess, tol=tol)
        rate = learning_rate(dynamics, snapshot.centre, lr)
        slope = jax.grad(dynamics.loss)(params)
        along = jnp.abs(jax.vmap(lambda u: optax.tree.vdot(u, slope))(pairs.vectors))
        least = float(jnp.finfo(along.dtype).tiny)
        factors = jnp.real(principal_coefficient(rate * pairs.values, least))
        values = factors * along
        named = {f"stability_coefficient_{i + 1}": v for i, v in enumerate(values)}
        named["stability_residual"] = jnp.max(pairs.residuals)
        # A lane that has diverged must not hand NaN to a later warm start.
        well = jnp.all(jnp.isfinite(pairs.residuals))
        return named, optax.tree.where(well, pairs.vectors, guess)

    return Metric(
        lambda snapshot, lr: starting_directions(snapshot.centre.params, k), update
    )
