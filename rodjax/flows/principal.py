"""The principal flow: gradient descent's own rate along every Hessian eigenvector."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Complex, Float, PyTree

from rodjax.coefficients import principal_coefficient
from rodjax.dynamics import Dynamics, State
from rodjax.flows.base import Flow, alone
from rodjax.flows.scope import gradient_descent_start
from rodjax.flows.tracking import top_directions, turn
from rodjax.stability import learning_rate

# Where eta l = 1 one step ends a direction, at an infinite rate: the least |1 - eta l|
# taken into account, in the exact flow and, for a solver of four substeps, in the other.
LEAST_EXACT = 1e-12
LEAST = 2.5e-3


class PrincipalState(NamedTuple):
    """State of the exact principal flow.

    - `mean`: the optimizer state; its parameters are the real part.
    - `imaginary`: the parameters' imaginary part.
    """

    mean: State
    imaginary: PyTree


class TopState(NamedTuple):
    """State of the principal flow on the top eigenspace.

    - `mean`: the optimizer state.
    - `directions`: [k, d], rows along the top eigenvectors of the Hessian.
    """

    mean: State
    directions: Float[Array, "k d"]


def principal(dynamics: Dynamics, *, top: int | None = None) -> Flow:
    r"""The principal flow of gradient descent.

    Over the eigenpairs $(\lambda_i, u_i)$ of the Hessian,

    $$\dot w = \sum_i \frac{\log(1 - \eta\lambda_i)}{\lambda_i}\, (g \cdot u_i)\, u_i ,$$

    with the limit $-\eta g$ where $\lambda \to 0$. On a quadratic it is gradient
    descent at every whole step, sign flips and divergence included. The coefficient's
    real part $\ln|1 - \eta\lambda|/\lambda$ turns positive at $\eta\lambda = 2$: that
    direction is then climbed. Source: Rosca et al., arXiv 2302.01952.

    - `top=None`, exact: complex where $\eta\lambda > 1$, by $\log(1 - x) = \ln|1 - x| +
      i\pi$, so the loss is evaluated at complex parameters, which it must extend to
      analytically. The Hessian is formed and diagonalized: for small problems, on CPU.
      The centre is the real part; with time at whole steps it is the iterate itself,
      not a midpoint.
    - `top=k`, for networks: the real part of the coefficient on the k top eigenvectors,
      tracked along, and the first two terms of its series, `rodjax.flows.igr`, on the
      rest. Real: it follows the size of the iterates' swings, not their signs.

    The rate is infinite at $\eta\lambda = 1$; it is cut off there, the exact flow's far
    beyond what matters (an adaptive solver serves), the other's at -6 per step.

    **Raises** `ValueError` if `top` is below 1, and from `init` for any optimizer but
    gradient descent and, if exact, for a loss that does not take complex parameters.

    ```python
    >>> import jax.numpy as jnp, optax, diffrax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.0), lambda w: jnp.sum(jnp.array([1.2, 0.2])*w**2))
    >>> flow = rj.flows.principal(sgd)
    >>> options = {"solver": diffrax.Dopri8(), "substeps": 8}
    >>> path = rj.integrate(flow, jnp.ones(2), steps=3, **options)
    >>> path.params[:, 0].round(6).tolist()  # (1 - 2.4)^t
    [1.0, -1.4, 1.96, -2.744]

    ```
    """
    if top is None:
        return _exact(dynamics)
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    return _top(dynamics, top)


def _exact(dynamics: Dynamics) -> Flow:
    def init(start, lr, key) -> PrincipalState:
        mean = gradient_descent_start(dynamics, start, lr, "principal")
        zeros = optax.tree.zeros_like(mean.params)
        turned = jax.tree.map(jax.lax.complex, mean.params, zeros)
        try:
            out = jax.eval_shape(dynamics.loss, turned)
            analytic = jnp.issubdtype(out.dtype, jnp.complexfloating)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "principal: the loss does not take complex parameters, which the exact "
                "flow needs. Give top=k for its approximation by k eigenpairs"
            ) from error
        if not analytic:
            raise ValueError(
                "principal: the loss of complex parameters is real, so it is not "
                "analytic (no abs, norm or conj). Write it with squares, or give top=k"
            )
        return PrincipalState(mean, zeros)

    def vector_field(t, y: PrincipalState, lr: PyTree) -> PrincipalState:
        rate = learning_rate(dynamics, y.mean, lr)
        real, unravel = ravel_pytree(y.mean.params)
        point = jax.lax.complex(real, ravel_pytree(y.imaginary)[0])

        def loss(x: Complex[Array, " d"]) -> Complex[Array, ""]:
            parts = unravel(jnp.real(x)), unravel(jnp.imag(x))
            return dynamics.loss(jax.tree.map(jax.lax.complex, *parts))

        slope_of = jax.grad(loss, holomorphic=True)
        slope, curve = jax.linearize(slope_of, point)
        hessian = jax.vmap(curve)(jnp.eye(point.size, dtype=point.dtype))
        # Symmetric but, away from the reals, not Hermitian.
        values, vectors = jnp.linalg.eig(hessian)
        along = jnp.linalg.solve(vectors, slope)
        move = vectors @ (rate * principal_coefficient(rate * values, LEAST_EXACT) * along)
        phase = (unravel(jnp.real(move)), *optax.tree.zeros_like(y.mean.phase[1:]))
        field = State(phase, y.mean.slow, optax.tree.ones_like(y.mean.clock))
        return PrincipalState(field, unravel(jnp.imag(move)))

    return Flow(
        init=init,
        vector_field=vector_field,
        centre=lambda y: y.mean,
        observe=lambda y, lr: alone(y.mean.params),
        dynamics=dynamics,
        evaluations=1,
        products=float("nan"),
    )


def _top(dynamics: Dynamics, count: int) -> Flow:
    def init(start, lr, key) -> TopState:
        mean = gradient_descent_start(dynamics, start, lr, "principal")
        return TopState(mean, top_directions(dynamics, mean, lr, count))

    def vector_field(t, y: TopState, lr: PyTree) -> TopState:
        field = dynamics.increment(y.mean, lr)
        rate = learning_rate(dynamics, y.mean, lr)
        step, unravel = ravel_pytree(field.params)
        point = ravel_pytree(y.mean.params)[0]
        slope_of = jax.grad(lambda x: dynamics.loss(unravel(x)))
        _, curve = jax.linearize(slope_of, point)
        seen = turn(curve, jnp.full_like(point, rate), y.directions)
        # In units of P = 1 / eta the curvature is eta l itself.
        values, inside = jnp.linalg.eigh(seen.curvature)
        vectors = inside.T @ seen.directions
        along = vectors @ step / rate
        series = -1.0 - 0.5 * values
        extra = jnp.real(principal_coefficient(values, LEAST)) - series
        move = step + 0.5 * rate * curve(step) - (extra * along) @ vectors
        mean = field._replace(phase=(unravel(move), *field.phase[1:]))
        return TopState(mean, seen.rate)

    return Flow(
        init=init,
        vector_field=vector_field,
        centre=lambda y: y.mean,
        observe=lambda y, lr: alone(y.mean.params),
        dynamics=dynamics,
        evaluations=1,
        products=count + 1,
    )
