"""The modulated flow: centre and alternating part of any optimizer, both smooth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.flows._flow import (
    YOUNG,
    Floor,
    Flow,
    centre_of,
    floor_size,
    half_step_back,
    shift,
    stack,
    step_back,
)
from rodjax.flows._ringing import ringing
from rodjax.flows._scope import check_seen, warn_of_period
from rodjax.linalg import alike, dot, length, random_direction
from rodjax.optimizer import Dynamics, State, Window, alternating, has_momentum

# Growth rates per step for which the scalar logarithm below is used as it is.
SLOWEST, FASTEST = -0.3, 1.0
# One of n directions has 1/sqrt(n) of the rounding errors, gathered over steps before
# its onset: measured, as the share with which onsets come at the run's own steps.
GATHERED = 3.0
# Roundoffs of the parameters that a delta must have to be seen in their gradient.
VISIBLE = 32.0
# How many times its second difference the sixth of an alternation may be.
UNSTEADY = 2.0
# Of the nested field of order 3: f(y - NEAR f(y - b f(y))) counts LAST, and the rest of
# 1 f(y). With b = FAR f'f counts -1/2, f'f'f 1/3 and f''(f, f) 1/12, all as they must.
LAST, NEAR, FAR = 1.5, 1 / 3, 2 / 3
# What momentum takes from b, times what is left of an alternation squared after a step:
# with b above 1/3 a rate on the circle |1 + X| = 1 may grow. Measured.
RINGING = 0.5


class ModulatedState(NamedTuple):
    """State of the modulated flow.

    - `mean`: the optimizer state at the centre c (phase, slow, clock).
    - `delta`: the alternating part, structured as the phase: z[t] = c + (-1)^t delta.
    - `memory`: the alternating amplitude that momentum still carries (`ringing`), [].
    - `log_decay`: its rate per step, a constant, [].
    """

    mean: State
    delta: PyTree
    memory: Float[Array, ""]
    log_decay: Float[Array, ""]


def modulated(dynamics: Dynamics, *, order: int = 2, floor: Floor = None) -> Flow:
    r"""The modulated flow of any optimizer (ours).

    Write the optimizer's phase as $z_t = c_t + (-1)^t \delta_t$ with c and delta both
    smooth (a modulated Fourier expansion; Hairer, Lubich, Wanner, *Geometric Numerical
    Integration*, XIII). With $F_\pm = F(c \pm \delta, s)$ and F = Phi - id the
    increment of the update map, one step is exactly a unit Euler step of

    $$\dot c = \tfrac12 (F_+ + F_-), \quad \dot s = \text{mean of } F_s, \quad
      \dot\delta = -\tfrac12 (F_+ - F_-) - 2\delta .$$

    No eigenvectors and no Hessian-vector products: delta finds the unstable directions
    itself, several at once, and momentum (a non-symmetric map) is no special case.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`.
    - `order`: of the logarithm of the update map that the field f is corrected to by
      backward error analysis, 1, 2 or 3, for 2, 4 or 6 evaluations of Phi. 1: f itself.
      2: $f(y - f(y)/2)$. 3: $\tfrac32 f(y - \tfrac13 g) - \tfrac12 f$, $g = f(y - b
      f(y))$, which with b = 2/3 is $f - \tfrac12 f'f + \tfrac13 f'f'f + \tfrac1{12}
      f''(f, f)$; with momentum $b = 2/3 - \rho^2/2$ for the phase, rho what it keeps of
      an alternation in a step, lest its complex pairs grow. Along delta, the 1/2 is
      replaced by $k(\sigma) = (\sigma - \log(1 + \sigma))/\sigma^2 = 1/2 - \sigma/3 +
      \dots$ with sigma the growth rate of delta, so that its growth is exact however
      violent the onset; and the centre is taken back no further than a solver with 4
      substeps bears. A series: 3 is closer where the run can be predicted at all, but
      may overshoot a violent burst (GD on a CNN, in float64), which 2 does not.
    - `floor`: the least size of delta in the parameters, relative to their norm; `None`
      for what rounding gives one direction of a real run, the dtype's epsilon times
      3/sqrt(n), at most 1, for n parameters; 0 for none; or a function of `lr`,
      such as `lambda h: h["floor"]` in a sweep. Below it delta is pushed out
      along itself. With momentum the floor is what the run still carries
      (`rodjax.ringing`), if that is more. A delta near rounding errors is evaluated at
      a multiple of it, where its field is still linear.

    **Starting points.** From scratch: c = w0 and delta a random vector of the floor's
    size. From a window: delta its alternating part, c the rest of the state there.

    Memory of `integrate`, beyond the gradient's own: 8 copies of the parameters without
    momentum, 17 with Adam; of order 3, 11 and 23.

    **Raises** `ValueError` if `order` is none of these or `floor` negative, and from
    `init` if the loss multiplies in half a precision (`rodjax.flows.check_seen`). Warns
    from `init`, by `rodjax.flows.PeriodWarning`, of an optimizer that first loses
    stability to an oscillation of another period, as two filters of the gradient in a
    row do; says nothing of one whose `lr` is several hyperparameters, which may decide
    on it.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> path = rj.integrate(rj.flows.modulated(sgd), valley.params, steps=800)
    >>> bool(abs(path.params["y"][-1] - 2 / 0.3) < 0.2)
    True

    ```
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    least = floor_size(floor)

    def roundoff(params: PyTree, lr: PyTree) -> Array:
        share = min(1.0, GATHERED / optax.tree.size(params) ** 0.5)
        return least(params, lr) * (share if floor is None else 1.0)

    def raw_field(mean: State, delta: PyTree, lr: PyTree) -> tuple[State, PyTree]:
        reach = _reach(mean.params, delta[0])
        plus = dynamics.increment(shift(mean, delta, reach), lr=lr)
        minus = dynamics.increment(shift(mean, delta, -reach), lr=lr)
        d_mean = jax.tree.map(lambda p, m: 0.5 * (p + m), plus, minus)
        d_delta = jax.tree.map(
            lambda p, m, d: -0.5 * (p - m) / reach - 2.0 * d,
            plus.phase,
            minus.phase,
            delta,
        )
        return d_mean, d_delta

    def corrected(
        y: ModulatedState, d_mean: State, d_delta: PyTree, lr: PyTree
    ) -> tuple[State, PyTree]:
        mean, delta = y.mean, y.delta
        rate = _growth(delta, d_delta)
        lag = _lag(rate)
        if order == 2:
            back = optax.tree.add_scale(delta, -lag, d_delta)
            return raw_field(half_step_back(mean, d_mean), back, lr)
        kept = jnp.exp(2.0 * y.log_decay) if has_momentum(mean) else 0.0
        far = FAR - RINGING * kept
        back = step_back(mean, d_mean, FAR)
        share = _bearable(far, rate)
        phase = optax.tree.add_scale(mean.phase, -share, d_mean.phase)
        back = back._replace(phase=phase)
        mid = optax.tree.add_scale(delta, -far, d_delta)
        g_mean, g_delta = raw_field(back, mid, lr)
        # So that on what grows by sigma the three come to sigma - k(sigma) sigma^2.
        near = lag / (LAST * (1.0 - far * rate))
        back = optax.tree.add_scale(delta, -near, g_delta)
        last = raw_field(step_back(mean, g_mean, NEAR), back, lr)
        mix = lambda f, h: (1.0 - LAST) * f + LAST * h
        field, d_delta = jax.tree.map(mix, (d_mean, d_delta), last)
        # As where the fields are evaluated: second moments grow from nothing.
        slow = jax.tree.map(
            lambda f, s, first: jnp.maximum(f, YOUNG * (s + first) - s),
            field.slow,
            mean.slow,
            d_mean.slow,
        )
        return field._replace(slow=slow), d_delta

    def vector_field(t, y: ModulatedState, lr: PyTree) -> ModulatedState:
        d_mean, d_delta = raw_field(y.mean, y.delta, lr)
        lowest = jnp.maximum(roundoff(y.mean.params, lr), y.memory)
        push = 2.0 * jnp.maximum(lowest / _size(y.delta, d_delta) - 1.0, 0.0)
        if order > 1:
            d_mean, d_delta = corrected(y, d_mean, d_delta, lr)
        return ModulatedState(
            mean=d_mean,
            delta=optax.tree.add_scale(d_delta, push, y.delta),
            memory=y.log_decay * y.memory,
            log_decay=jnp.zeros_like(y.log_decay),
        )

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> ModulatedState:
        if isinstance(start, Window):
            delta = _alternation(start)
            # Not the midpoint, which adds a quarter of the second difference to a
            # smooth path, and so is not on it.
            mean = shift(dynamics.fluid(start.at(0), lr=lr), delta, -1.0)
            memory, log_decay = ringing(dynamics, start, lr=lr)
            scale = floor(lr) if callable(floor) else floor
            memory = memory if scale is None else jnp.where(scale == 0, 0, memory)
        else:
            mean = centre_of(dynamics, start, lr=lr)
            delta = alike(optax.tree.zeros_like(mean.phase), mean.phase)
            memory = log_decay = jnp.zeros_like(roundoff(mean.params, lr))
        warn_of_period(dynamics, mean.params, "the modulated flow", lr=lr)
        check_seen(dynamics, mean.params, "the modulated flow")
        # Any delta at all needs a direction to be pushed along.
        noise = random_direction(key, mean.params)
        size = roundoff(mean.params, lr) / optax.tree.norm(noise)
        delta = (optax.tree.add_scale(delta[0], size, noise), *delta[1:])
        return ModulatedState(mean, delta, memory, log_decay)

    return Flow(
        init=init,
        vector_field=vector_field,
        observe=lambda y, *, lr: (
            stack(shift(y.mean, y.delta).params, shift(y.mean, y.delta, -1.0).params),
            {},
        ),
        dynamics=dynamics,
        evaluations=2 * order,
    )


def _alternation(window: Window) -> PyTree:
    """The phase's alternating part, by as high a difference as it is steady enough for.

    What grows by e^sigma a step is too large in the sixth difference by
    cosh(sigma/2)^6, and not to be believed where the second has much less of it.
    """
    near, far = alternating(window, 2).phase, alternating(window).phase
    steady = length(far[0]) <= UNSTEADY * length(near[0])
    return optax.tree.where(steady, far, near)


def _size(delta: PyTree, d_delta: PyTree) -> Array:
    """Size of the alternation of the parameters, momentum's share in them included.

    What momentum carries shows in the step it is about to make: |(F+ - F-)/2|.
    """
    own = length(delta[0])
    # None at the first step of Adam, whose size does not depend on the gradient.
    kick = length(optax.tree.add_scale(d_delta[0], 2.0, delta[0]))
    return jnp.maximum(jnp.hypot(own, kick), jnp.finfo(own.dtype).tiny)


def _reach(params: PyTree, delta: PyTree) -> Array:
    """How many delta to either side of c to evaluate: one, but for the smallest delta.

    Those vanish among the rounding errors of c, and their field is linear.
    """
    size = optax.tree.norm(delta)
    epsilon, tiny = jnp.finfo(size.dtype).eps, jnp.finfo(size.dtype).tiny
    visible = VISIBLE * float(epsilon) * optax.tree.norm(params)
    # No more, lest a delta of zero gets an infinite one.
    return jnp.clip(visible / jnp.maximum(size, tiny), 1.0, 1.0 / float(epsilon))


def _growth(delta: PyTree, d_delta: PyTree) -> Array:
    """sigma, the growth rate of delta by its plain field."""
    size = jnp.maximum(dot(delta[0], delta[0]), 0.0)
    tiny = jnp.finfo(size.dtype).tiny
    rate = dot(delta[0], d_delta[0]) / jnp.maximum(size, tiny)
    return jnp.clip(rate, SLOWEST, FASTEST)


def _lag(rate: Array) -> Array:
    """k(sigma): how far back along delta its field is evaluated."""
    # The closed form cancels near zero; there its series is exact to rounding.
    small = jnp.abs(rate) < 0.02
    safe = jnp.where(small, 1.0, rate)
    series = 0.5 + rate * (-1 / 3 + rate * (1 / 4 - rate / 5))
    return jnp.where(small, series, (safe - jnp.log1p(safe)) / safe**2)


def _bearable(far: float | Array, rate: Array) -> Array:
    """b of order 3, less where delta grows so that c's field gets no stiffer.

    Where delta grows by sigma, c is contracted by s = 2 + sigma, which the field makes
    s + s^2/2 + b s^3/2 of: no more than at the threshold, where s = 2.
    """
    s = 2.0 + jnp.maximum(rate, 0.0)
    return jnp.minimum(far, 2.0 * (4.0 + 4.0 * far - s - 0.5 * s**2) / s**3)
