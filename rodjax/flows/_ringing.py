"""How much alternation momentum will still carry when it reaches its threshold."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.curvature import sharpness_ratio
from rodjax.linalg import dot, length, square_root
from rodjax.optimizer import (
    Dynamics,
    Window,
    alternating,
    alternating_multiplier,
    coordinate_thresholds,
    has_momentum,
    midpoint,
)

# Where between rest and threshold the decay is read: half way, where an optimizer
# without momentum has none left.
HALF_WAY = 0.5
# The rate of what is gone in a step: that at which a delta of its own is damped.
GONE = -2.0


class Ringing(NamedTuple):
    """Oscillation that is not yet an alternation but will be one at the threshold.

    - `amplitude`: of the parameters at the window's step, [].
    - `log_decay`: its rate per step, negative, [].
    """

    amplitude: Float[Array, ""]
    log_decay: Float[Array, ""]


def ringing(dynamics: Dynamics, window: Window, *, lr: PyTree = None) -> Ringing:
    r"""Estimate the ringing of a run from a window of it.

    With momentum a mode below its threshold is a complex pair of modulus rho =
    sqrt(beta): it rings on, decaying as rho^t only, and its frequency rises to that of
    an alternation as its curvature reaches the threshold. What is left of it then, not
    rounding, is what the oscillation grows from.

    Two estimates of its amplitude, combined as $a_{top}^{r} a_{all}^{1-r}$ with r the
    preconditioned sharpness over its threshold: near the threshold the present top
    eigenvector is the one that will arrive there; far from it any mode may.

    - $a_{top}$: fourth differences d along the top eigenvector at three steps give the
      mean square over the phase of the oscillation, $(d_0^2 - d_{-1} d_1) / (2
      \sin^2\theta)$, theta the angle of the mode's multiplier mu; divided by the gain
      $|(2 - \mu - 1/\mu)/4|^2$ of the difference.
    - $a_{all}$: for a single frequency, differences $d_4, d_6$ of all parameters are
      $q^2 a, q^3 a$ with $q = \sin^2(\theta/2)$, so $a = d_4^3 / d_6^2$.

    Without momentum the amplitude is 0: modes half way below the threshold are gone in
    a step. The rule knows the optimizer through its linear map alone.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> momentum = optax.sgd(0.1, momentum=0.25)
    >>> heavy_ball = rj.dynamics(momentum, lambda w: 0.5 * jnp.sum(w**2))
    >>> window = rj.warm_up(heavy_ball, jnp.ones(2), steps=5)
    >>> round(float(rj.ringing(heavy_ball, window).log_decay), 4)  # log sqrt(0.25)
    -0.6931

    ```
    """
    state = midpoint(window)
    dtype = jnp.result_type(*jax.tree.leaves(state.params))
    if not has_momentum(state):
        return Ringing(jnp.zeros((), dtype), jnp.asarray(GONE, dtype))

    fourth = length(alternating(window, 4).params)
    sixth = length(alternating(window, 6).params)
    tiny = jnp.finfo(dtype).tiny
    everywhere = fourth * (fourth / jnp.maximum(sixth, tiny)) ** 2

    pair = sharpness_ratio(dynamics, state, lr=lr)
    root = jax.tree.map(jnp.sqrt, coordinate_thresholds(dynamics, state, lr=lr))
    mode = jax.tree.map(lambda v, r: v / r, pair.vector, root)
    dual = optax.tree.mul(pair.vector, root)
    before, now, after = (
        dot(dual, alternating(window, 4, ahead).params) for ahead in (-1, 0, 1)
    )
    mu = alternating_multiplier(dynamics, state, pair.value, lr=lr)
    sine = jnp.abs(jnp.imag(mu)) / jnp.abs(mu)
    turning = square_root(jnp.maximum(0.5 * (now**2 - before * after), 0.0))
    # A real multiplier does not turn: there the difference itself is the amplitude.
    size = jnp.where(sine > 0.1, turning / jnp.maximum(sine, 0.1), jnp.abs(now))
    gain = jnp.abs((2.0 - mu - 1.0 / mu) / 4.0) ** 2
    top = size * optax.tree.norm(mode) / gain

    ratio = jnp.clip(pair.value, 0.0, 1.0)
    amplitude = _power(top, ratio) * _power(everywhere, 1.0 - ratio)
    decay = jnp.abs(alternating_multiplier(dynamics, state, HALF_WAY, lr=lr))
    # Where the linear map does not exist there is nothing to remember by.
    known = jnp.isfinite(amplitude) & (decay > 0)
    amplitude = jnp.where(known, amplitude, 0.0)
    # No faster, lest a solver of a few substeps becomes unstable.
    rate = jnp.maximum(jnp.log(jnp.where(known, decay, 1.0)), GONE)
    log_decay = jnp.where(known, rate, GONE)
    return Ringing(jnp.astype(amplitude, dtype), jnp.astype(log_decay, dtype))


def _power(base: Float[Array, ""], exponent: Float[Array, ""]) -> Float[Array, ""]:
    """base ** exponent, which does not change with a base of zero."""
    zero = base == 0
    return jnp.where(zero, exponent == 0, jnp.where(zero, 1.0, base) ** exponent)
