"""The modulated flow: centre and alternating part of any optimizer, both smooth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.flows._flow import (
    Floor,
    Flow,
    VectorField,
    centre_of,
    floor_size,
    shift,
    stack,
    step_back,
)
from rodjax.flows._ringing import ringing
from rodjax.flows._scope import check_seen, warn_of_period
from rodjax.linalg import alike, dot, length, random_direction
from rodjax.optimizer import Dynamics, State, Window, alternating

# Growth rates per step for which the scalar logarithm below is used as it is.
SLOWEST, FASTEST = -0.3, 1.0
# One of n directions has 1/sqrt(n) of the rounding errors, gathered over steps before
# its onset: measured, as the share with which onsets come at the run's own steps.
GATHERED = 3.0
# The power of the roundoff that a delta, relative to the parameters, must have to be
# seen in their gradient: 54 roundoffs in single precision, which bursts are far above.
VISIBLE = 0.75
# How many times its second difference the sixth of an alternation may be.
UNSTEADY = 2.0
# Steps of Euler's method for whose stability the field provides at least; for a quarter
# of a step by Heun's, with some room.
SHORTEST = 0.3


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


def modulated(dynamics: Dynamics, *, degree: int = 2, floor: Floor = None) -> Flow:
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
    - `degree`: of the polynomial in the derivative of f, the field above, by which the
      update map's logarithm is approached (backward error analysis): 1, 2 or 3, for 2,
      4 or 6 evaluations of Phi. 1: f itself. 2: $f(y - a f(y))$ with a = 1/2, which is
      $f - \tfrac12 f'f$ to second order. 3: $f(y - a f(y - b f(y)))$ with b = 1/3, half
      of what the third order asks for, and the most with which the complex pairs of
      momentum do not grow. Along delta, a is what makes its growth exact however
      violent the onset: $k(\sigma) = (\sigma - \log(1 + \sigma))/\sigma^2 = 1/2 -
      \sigma/3 + \dots$ with sigma its growth rate. Where delta grows, the centre is
      taken back no further than the solver is stable for.
    - `floor`: the least size of delta in the parameters, relative to their norm; `None`
      for what rounding gives one direction of a real run, the dtype's epsilon times
      3/sqrt(n), at most 1, for n parameters; 0 for none; or a function of `lr`,
      such as `lambda h: h["floor"]` in a sweep. Below it delta is pushed out
      along itself. With momentum the floor is what the run still carries
      (`rodjax.ringing`), if that is more. A delta near rounding errors is evaluated at
      a multiple of it, where its field is still linear.

    **Steps.** With degrees 2 and 3 it is solved by steps of Euler's method, two to an
    optimizer step, by default: `euler_field(h)` is the field whose Euler steps of size
    h follow the h-th power of the update map, which begins with $1 + h X - \tfrac12 h
    (1 - h) X^2 + \tfrac16 h (1 - h)(2 - h) X^3$: a = (1 - h)/2, b = (1 - h)(2 - h)/(6 -
    4h), and k with $((1 + \sigma)^h - 1)/h$ in place of the logarithm (ours). It is the
    flow's own field for h = 0 and the optimizer for h = 1. What is left out of the
    logarithm has 3/8 of its size at h = 1/2, so that these steps are closer to the run
    than the flow solved exactly is.

    **Starting points.** From scratch: c = w0 and delta a random vector of the floor's
    size. From a window: delta its alternating part, c the rest of the state there.

    Memory of `integrate`, beyond the gradient's own: 6 copies of the parameters without
    momentum, 13 with Adam; of degree 3, 6 and 16.

    **Raises** `ValueError` if `degree` is none of these or `floor` negative, and from
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
    if degree not in (1, 2, 3):
        raise ValueError(f"degree must be 1, 2 or 3, got {degree}")
    least = floor_size(floor)

    def roundoff(params: PyTree, lr: PyTree) -> Array:
        share = min(1.0, GATHERED / optax.tree.size(params) ** 0.5)
        return least(params, lr) * (share if floor is None else 1.0)

    def raw_field(
        mean: State, delta: PyTree, reach: Array, lr: PyTree
    ) -> tuple[State, PyTree]:
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
        y: ModulatedState,
        d_mean: State,
        d_delta: PyTree,
        rate: Array,
        reach: Array,
        lr: PyTree,
        step: float,
    ) -> tuple[State, PyTree]:
        mean, delta = y.mean, y.delta
        near, far = 0.5 * (1.0 - step), (1.0 - step) * (2.0 - step) / (6.0 - 4.0 * step)
        lag = _lag(rate, step)
        # -s becomes -s (1 + near s (1 + far s)); Euler's method bears -2 / step.
        bound = 2.0 / max(step, SHORTEST)
        stiff = 2.0 + jnp.maximum(rate, 0.0)
        most = (bound / stiff - 1.0) / stiff
        if degree == 2:
            back = _back(mean, d_mean, near, jnp.minimum(near, most))
            behind = optax.tree.add_scale(delta, -lag, d_delta)
            return raw_field(back, behind, reach, lr)
        share = jnp.minimum(far, (most / near - 1.0) / stiff)
        back = _back(mean, d_mean, far, share)
        behind = optax.tree.add_scale(delta, -far, d_delta)
        g_mean, g_delta = raw_field(back, behind, reach, lr)
        # So that on what grows by sigma both come to the same as that one.
        behind = optax.tree.add_scale(delta, -lag / (1.0 - far * rate), g_delta)
        return raw_field(step_back(mean, g_mean, near), behind, reach, lr)

    def euler_field(step: float) -> VectorField:
        if not 0 <= step < 1:
            raise ValueError(f"step must be at least 0 and less than 1, got {step}")

        def vector_field(t, y: ModulatedState, lr: PyTree) -> ModulatedState:
            # Once for all, for each is a pass over the parameters.
            size = length(y.delta[0])
            reach = _reach(y.mean.params, size)
            d_mean, d_delta = raw_field(y.mean, y.delta, reach, lr)
            lowest = jnp.maximum(roundoff(y.mean.params, lr), y.memory)
            shown = _shown(size, y.delta, d_delta)
            push = 2.0 * jnp.maximum(lowest / shown - 1.0, 0.0)
            if degree > 1:
                rate = _growth(size, y.delta, d_delta, reach)
                now = y, d_mean, d_delta, rate, reach
                d_mean, d_delta = corrected(*now, lr, step)
            fading = jnp.expm1(step * y.log_decay) / step if step else y.log_decay
            return ModulatedState(
                mean=d_mean,
                delta=optax.tree.add_scale(d_delta, push, y.delta),
                memory=fading * y.memory,
                log_decay=jnp.zeros_like(y.log_decay),
            )

        return vector_field

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
        vector_field=euler_field(0.0),
        euler_field=euler_field if degree > 1 else None,
        substeps=2 if degree > 1 else 4,
        observe=lambda y, *, lr: (
            stack(shift(y.mean, y.delta).params, shift(y.mean, y.delta, -1.0).params),
            {},
        ),
        dynamics=dynamics,
        evaluations=2 * degree,
    )


def _alternation(window: Window) -> PyTree:
    """The phase's alternating part, by as high a difference as it is steady enough for.

    What grows by e^sigma a step is too large in the sixth difference by
    cosh(sigma/2)^6, and not to be believed where the second has much less of it.
    """
    near, far = alternating(window, 2).phase, alternating(window).phase
    steady = length(far[0]) <= UNSTEADY * length(near[0])
    return optax.tree.where(steady, far, near)


def _shown(own: Array, delta: PyTree, d_delta: PyTree) -> Array:
    """Size of the alternation of the parameters, momentum's share in them included.

    What momentum carries shows in the step it is about to make: |(F+ - F-)/2|.
    """
    # None at the first step of Adam, whose size does not depend on the gradient.
    kick = length(optax.tree.add_scale(d_delta[0], 2.0, delta[0]))
    return jnp.maximum(jnp.hypot(own, kick), jnp.finfo(own.dtype).tiny)


def _reach(params: PyTree, size: Array) -> Array:
    """How many delta to either side of c to evaluate: one, but for the smallest delta.

    Those vanish among the rounding errors of c, and their field is linear.
    """
    epsilon, tiny = jnp.finfo(size.dtype).eps, jnp.finfo(size.dtype).tiny
    visible = float(epsilon) ** VISIBLE * optax.tree.norm(params)
    # No more, lest a delta of zero gets an infinite one.
    return jnp.clip(visible / jnp.maximum(size, tiny), 1.0, 1.0 / float(epsilon))


def _growth(size: Array, delta: PyTree, d_delta: PyTree, reach: Array) -> Array:
    """sigma, the growth rate of delta by its plain field; 0 of one that is not seen."""
    tiny, epsilon = (getattr(jnp.finfo(size.dtype), x) for x in ("tiny", "eps"))
    rate = dot(delta[0], d_delta[0]) / jnp.maximum(size**2, tiny)
    return jnp.where(reach * epsilon < 1.0, jnp.clip(rate, SLOWEST, FASTEST), 0.0)


def _back(mean: State, d_mean: State, share: float, own: Array) -> State:
    """`step_back`, the phase by a share of its own."""
    phase = optax.tree.add_scale(mean.phase, -own, d_mean.phase)
    return step_back(mean, d_mean, share)._replace(phase=phase)


def _lag(rate: Array, step: float) -> Array:
    """How far back along delta its field is evaluated: k(sigma), at a step of 0."""
    # The closed form cancels near zero; there its series is exact to rounding.
    small = jnp.abs(rate) < 0.02
    safe = jnp.where(small, 1.0, rate)
    series = jnp.ones_like(rate)
    for n in (5, 4, 3):
        series = 1.0 - (n - 1 - step) / n * rate * series
    grown = jnp.log1p(safe)
    grown = jnp.expm1(step * grown) / step if step else grown
    return jnp.where(small, 0.5 * (1.0 - step) * series, (safe - grown) / safe**2)
