"""An oscillation carried as a direction and the logarithm of its size."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.flows._flow import Flow, rms
from rodjax.linalg import dot
from rodjax.optimizer import Window

# Growth rates per step at which a unit step is told from its logarithm.
SLOWEST = -0.3
# Rate per step at which the direction is brought back to unit size.
HELD = 0.5


class PolarState(NamedTuple):
    """State of `polar(flow)`.

    - `state`: the flow's own, its `delta` replaced by the direction u of it, whose root
      mean square over the parameters is about 1.
    - `log_size`: rho, with delta = exp(rho) u, [].
    """

    state: Any
    log_size: Float[Array, ""]


def polar(flow: Flow, *, unit: bool = False) -> Flow:
    r"""A flow with a `delta` in its state, which is carried as $\delta = e^\rho u$.

    An oscillation grows from rounding errors, 1e-17 of the parameters, to its burst. A
    solver with error control does not see it below its `atol`, and loses the onset;
    and a long step multiplies it by a polynomial where the growth is exponential. Here
    u and rho are of order one whatever the size. With A the field of delta, $\dot\delta
    = A\delta$ where it is small,

    $$\dot u = A u - \sigma u, \qquad \dot\rho = \sigma,$$

    with sigma the growth rate of delta, so that delta is the same for any sigma; what
    is exponential in it is linear in rho, which a step of any length gets right. With
    momentum the rate is the mean over parameters and moments, weighted by what each
    contributes to the next step, since either may pass through zero while a mode turns.

    **Arguments**

    - `flow`: such as `modulated(...)`; its state is a NamedTuple with `delta`.
    - `unit`: its field is the increment of a unit step, as with `degree=1`, and a step
      of delta is to count as $1 + \sigma$, not as $e^\sigma$: $\dot\rho = \log(1 +
      \sigma)$ and $\dot u = (A - \sigma) u / (1 + \sigma)$, of which a unit step is the
      optimizer's own, normalized. For solvers that do the same for the centre,
      `rodjax.RKC(bea=True)`.

    Its `error_norm` is the largest of three: of the centre, of u, of rho.

    **Raises** `TypeError` from `init` for a flow without a `delta`.

    ```python
    >>> import diffrax, jax.numpy as jnp, optax, rodjax as rj
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> flow = rj.flows.polar(rj.flows.modulated(sgd))
    >>> adapt = diffrax.PIDController(rtol=1e-3, atol=1e-5)
    >>> path = rj.integrate(
    ...     flow, valley.params, 800, solver=diffrax.Tsit5(), stepsize_controller=adapt
    ... )
    >>> bool(abs(path.params["y"][-1] - 2 / 0.3) < 0.2)
    True

    ```
    """

    def cartesian(y: PolarState, size: Array) -> Any:
        delta = jax.tree.map(lambda u: size * u, y.state.delta)
        return y.state._replace(delta=delta)

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> PolarState:
        state = flow.init(start, lr=lr, key=key)
        if not hasattr(state, "delta"):
            raise TypeError(
                f"polar is for flows that carry an oscillation as `delta`; the state "
                f"of this one is a {type(state).__name__}"
            )
        size = rms(state.delta[0])
        size = jnp.maximum(size, jnp.finfo(size.dtype).tiny)
        direction = jax.tree.map(lambda d: d / size, state.delta)
        return PolarState(state._replace(delta=direction), jnp.log(size))

    def vector_field(t: Any, y: PolarState, lr: PyTree) -> PolarState:
        size = jnp.exp(y.log_size)
        # One that is smaller has the field of this one, whose size can be divided by.
        size = jnp.maximum(size, float(jnp.finfo(size.dtype).tiny) ** 0.5)
        field = flow.vector_field(t, cartesian(y, size), lr)
        u = y.state.delta
        a = jax.tree.map(lambda d: d / size, field.delta)
        rate, excess = _growth(u, a)
        turn, grow = jnp.ones_like(rate), rate
        if unit:
            step = jnp.maximum(rate, SLOWEST)
            turn, grow = 1.0 / (1.0 + step), jnp.log1p(step) + rate - step
        held = HELD * excess
        d_u = jax.tree.map(lambda a, u: turn * (a - rate * u) - held * u, a, u)
        return PolarState(field._replace(delta=d_u), grow + held)

    def error_norm(error: PolarState) -> Array:
        rest = error.state._replace(delta=None)
        return jnp.maximum(
            jnp.maximum(rms(rest), rms(error.state.delta)), jnp.abs(error.log_size)
        )

    return replace(
        flow,
        init=init,
        vector_field=vector_field,
        euler_field=None,
        substeps=4,
        centre=lambda y: flow.centre(y.state),
        observe=lambda y, *, lr: flow.observe(cartesian(y, jnp.exp(y.log_size)), lr=lr),
        error_norm=error_norm,
    )


def _growth(u: PyTree, a: PyTree) -> tuple[Array, Array]:
    """The growth rate of u in the field a, and how far its mean square is from 1."""
    square = lambda tree: optax.tree.norm(tree, squared=True)
    size = square(u[0])
    tiny = jnp.finfo(size.dtype).tiny
    count = optax.tree.size(u[0])
    moments = [pair for pair in zip(u[1:], a[1:], strict=True) if jax.tree.leaves(pair)]
    total, along = size, dot(u[0], a[0])
    if moments:
        # The alternating part of the next step, which is what moments are there for.
        kick = square(optax.tree.add_scale(a[0], 2.0, u[0])) / len(moments)
        for moment, slope in moments:
            own = jnp.maximum(square(moment), tiny)
            rate = dot(moment, slope) / own
            # That of a moment which is not there yet is any.
            along += kick * jnp.clip(rate, -2.0, 1.0)
            total += kick
    total = jnp.maximum(total, tiny)
    return along / total, jnp.minimum(total / count, 2.0) - 1.0
