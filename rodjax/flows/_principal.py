"""The principal flow: gradient descent's own rate along every Hessian eigenvector."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Complex, PyTree

from rodjax.curvature import hessian_eigenpairs
from rodjax.flows._backward_error import half_step_earlier
from rodjax.flows._flow import Flow, moving
from rodjax.flows._logarithm import principal_coefficient
from rodjax.flows._scope import gradient_descent_start
from rodjax.flows._tracking import turn, with_sign
from rodjax.linalg import combine, dot
from rodjax.optimizer import Dynamics, Loss, State, for_loops, learning_rate

# Where eta l = 1 one step ends a direction, at an infinite rate. The least |1 - eta l|
# taken into account: in the exact flow and, for a solver of four substeps, the other.
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
    - `directions`: along the top eigenvectors of the Hessian, pytrees like the
      parameters on a leading axis k.
    """

    mean: State
    directions: PyTree


def principal(dynamics: Dynamics, *, rank: int | None = None) -> Flow:
    r"""The principal flow of gradient descent.

    Over the eigenpairs $(\lambda_i, u_i)$ of the Hessian,

    $$\dot w = \sum_i \frac{\log(1 - \eta\lambda_i)}{\lambda_i} (g \cdot u_i) u_i ,$$

    with the limit $-\eta g$ where $\lambda \to 0$. On a quadratic it is gradient
    descent at every whole step, sign flips and divergence included. The coefficient's
    real part $\ln|1 - \eta\lambda|/\lambda$ turns positive at $\eta\lambda = 2$: that
    direction is then climbed. Source: Rosca et al., arXiv 2302.01952.

    - `rank=None`, exact: complex where $\eta\lambda > 1$, by $\log(1 - x) = \ln|1 - x|
      + i\pi$, so the loss is evaluated at complex parameters, which it must extend to
      analytically. The Hessian is formed and diagonalized: for small problems, on CPU.
      The centre is the real part; with time at whole steps it is the iterate itself,
      not a midpoint.
    - `rank=k`, for networks: the real part of the coefficient on the k top
      eigenvectors, tracked along, and the first two terms of its series,
      `rodjax.flows.igr`, on the rest. Real: it follows the size of the iterates'
      swings, not their signs.

    The rate is infinite at $\eta\lambda = 1$; it is cut off there, the exact flow's far
    beyond what matters (an adaptive solver serves), the other's at -6 per step.

    **Raises** `ValueError` if `rank` is below 1, and from `init` for any optimizer but
    gradient descent and, if exact, for a loss that does not take complex parameters or
    is not analytic in them; and on a TPU, for the exact flow.

    Memory of `integrate`, beyond the gradient's own: 21 copies of the parameters
    with `rank=2`; the Hessian where it is exact.

    ```python
    >>> import jax.numpy as jnp, optax, diffrax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.0), lambda w: jnp.sum(jnp.array([1.2, 0.2])*w**2))
    >>> flow = rj.flows.principal(sgd)
    >>> options = {"solver": diffrax.Dopri8(), "substeps": 8}
    >>> path = rj.integrate(flow, jnp.ones(2), steps=3, **options)
    >>> bool(jnp.allclose(path.params[:, 0], (1 - 2.4) ** jnp.arange(4)))
    True

    ```
    """
    if rank is None:
        return _exact(dynamics)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return _top(dynamics, rank)


def _exact(dynamics: Dynamics) -> Flow:
    def init(start, *, lr, key) -> PrincipalState:
        if jax.default_backend() == "tpu":
            raise ValueError(
                "principal: the exact flow needs eigenvalues of a nonsymmetric matrix, "
                "which a TPU lacks: give rank=k, or run it on a CPU or GPU"
            )
        mean = gradient_descent_start(dynamics, start, "principal", lr=lr)
        zeros = optax.tree.zeros_like(mean.params)
        turned = jax.tree.map(jax.lax.complex, mean.params, zeros)
        _check_analytic(dynamics.loss, turned)
        return PrincipalState(mean, zeros)

    def vector_field(t, y: PrincipalState, lr: PyTree) -> PrincipalState:
        rate = learning_rate(dynamics, half_step_earlier(y.mean), lr=lr)
        rate = jax.lax.complex(rate, jnp.zeros_like(rate))
        real, unravel = ravel_pytree(y.mean.params)
        point = jax.lax.complex(real, ravel_pytree(y.imaginary)[0])

        def loss(x: Complex[Array, " d"]) -> Complex[Array, ""]:
            parts = unravel(jnp.real(x)), unravel(jnp.imag(x))
            return dynamics.loss(jax.tree.map(jax.lax.complex, *parts))

        slope_of = for_loops(jax.grad(loss, holomorphic=True))
        slope, curve = jax.linearize(slope_of, point)
        hessian = jax.vmap(curve)(jnp.eye(point.size, dtype=point.dtype))
        # Symmetric but, away from the reals, not Hermitian.
        values, vectors = jnp.linalg.eig(hessian)
        along = jnp.linalg.solve(vectors, slope)
        factors = principal_coefficient(rate * values, LEAST_EXACT)
        move = vectors @ (rate * factors * along)
        field = moving(y.mean, unravel(jnp.real(move)))
        return PrincipalState(field, unravel(jnp.imag(move)))

    return Flow(
        init=init,
        vector_field=vector_field,
        dynamics=dynamics,
        evaluations=1,
        products=float("nan"),
    )


def _check_analytic(loss: Loss, like: PyTree) -> None:
    """Try the loss out on numbers: along i v it must vary i times as along v."""
    with jax.ensure_compile_time_eval(), warnings.catch_warnings():
        # JAX warns where the loss drops an imaginary part, which is an error here.
        warnings.simplefilter("ignore")
        keys = jax.random.split(jax.random.key(0))
        point, along = (optax.tree.random_like(key, like) for key in keys)
        across = jax.tree.map(lambda v: 1j * v, along)
        try:
            slope = jax.jit(lambda v: jax.jvp(loss, (point,), (v,))[1])
            one, other = slope(along), slope(across)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "principal: the loss does not take complex parameters, which the exact "
                "flow needs. Give rank=k for its approximation by k eigenpairs"
            ) from error
        size = jnp.abs(one) + jnp.abs(other)
        apart = jnp.abs(other - 1j * one) > 1e-3 * size
    # A loss of data that are themselves traced leaves nothing to look at.
    known = not isinstance(apart, Tracer)
    if not jnp.iscomplexobj(one) or (known and bool(apart)):
        raise ValueError(
            "principal: the loss is not analytic in complex parameters (no abs, norm, "
            "vdot, conj or real). Write it with squares, or give rank=k"
        )


def _top(dynamics: Dynamics, count: int) -> Flow:
    def init(start, *, lr, key) -> TopState:
        mean = gradient_descent_start(dynamics, start, "principal", lr=lr)
        few = min(count, optax.tree.size(mean.params))
        pairs = hessian_eigenpairs(dynamics.loss, mean.params, few)
        return TopState(mean, with_sign(pairs.vectors))

    def vector_field(t, y: TopState, lr: PyTree) -> TopState:
        rate = learning_rate(dynamics, half_step_earlier(y.mean), lr=lr)
        params = y.mean.params
        slope, curve = jax.linearize(for_loops(jax.grad(dynamics.loss)), params)
        scaled = lambda v: optax.tree.scale(rate, v)
        step = scaled(optax.tree.scale(-1.0, slope))
        # Not as a preconditioner, by which a schedule that starts at zero is infinite.
        ones = optax.tree.ones_like(params)
        seen = turn(lambda v: scaled(curve(v)), ones, y.directions)
        values, inside = jnp.linalg.eigh(seen.curvature)
        vectors = combine(inside.T, seen.directions)
        along = jax.vmap(lambda v: dot(v, step))(vectors)
        series = -1.0 - 0.5 * values
        extra = jnp.real(principal_coefficient(values, LEAST)) - series
        more = combine((extra * along)[None], vectors)
        move = jax.tree.map(
            lambda s, h, m: s + 0.5 * rate * h - m[0], step, curve(step), more
        )
        return TopState(moving(y.mean, move), seen.rate)

    return Flow(
        init=init,
        vector_field=vector_field,
        dynamics=dynamics,
        evaluations=1,
        products=count + 1,
    )
