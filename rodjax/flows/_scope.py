"""Which optimizers a flow serves: those written for gradient descent, and near kin."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from rodjax.flows._flow import centre_of
from rodjax.optimizer import (
    Dynamics,
    State,
    Window,
    has_momentum,
    inverse_preconditioner,
    narrow_products,
)

# A hyperparameter to try an optimizer with, whatever it is: lr, decay or epsilon.
NOMINAL = 0.1


class PeriodWarning(UserWarning):
    """The optimizer first loses stability to an oscillation of another period than two.

    Silence it by `warnings.simplefilter("ignore", rodjax.flows.PeriodWarning)`.
    """


def warn_of_period(
    dynamics: Dynamics, params: PyTree, flow: str, *, lr: PyTree
) -> None:
    """Warn, by `PeriodWarning`, where `flow` models another oscillation than comes.

    Under tracing too, where what `dynamics.angle` says follows from shapes; no word of
    an optimizer whose angle it does not know.

    ```python
    >>> import warnings, jax.numpy as jnp, optax, rodjax as rj
    >>> filters = optax.chain(optax.trace(0.5), optax.trace(0.5), optax.sgd(0.05))
    >>> twice = rj.dynamics(filters, lambda w: jnp.sum(w**2))
    >>> with warnings.catch_warnings(record=True, action="always") as told:
    ...     rj.flows.warn_of_period(twice, jnp.ones(3), "my flow", lr=None)
    >>> str(told[0].message)[:73]
    'this optimizer first loses stability to an oscillation of period 6 (angle'

    ```
    """
    angle = dynamics.angle(params, lr=lr)
    if angle is not None and angle != math.pi:
        warnings.warn(
            "this optimizer first loses stability to an oscillation of period "
            f"{2 * math.pi / angle:.3g} (angle {angle:.3g} a step), and {flow} models "
            "only one of period two: it follows the run below rodjax.threshold, and "
            "not at the edge of stability",
            PeriodWarning,
            stacklevel=3,
        )


def check_seen(dynamics: Dynamics, params: PyTree, flow: str) -> None:
    """Raise `ValueError` where what `flow` begins with is not seen by the loss.

    An oscillation grows from rounding errors of the parameters. A loss that rounds
    them to half a precision before it multiplies does not change with it: what the
    differences of its gradients then are is rounding, and none of them growth.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: jnp.sum((w.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) ** 2)
    >>> sgd = rj.dynamics(optax.sgd(0.1), loss)
    >>> rj.flows.check_seen(sgd, jnp.eye(2), "my flow")
    Traceback (most recent call last):
    ...
    ValueError: my flow grows an oscillation from rounding errors of the parameters, ...

    ```
    """
    narrow = narrow_products(dynamics.loss, params)
    if narrow is not None:
        raise ValueError(
            f"{flow} grows an oscillation from rounding errors of the parameters, and "
            f"the loss multiplies in {narrow}, in which it is not seen: compute in "
            "float32 (dtype=jnp.float32 of Flax modules; parameters may stay as they "
            "are), or take rodjax.flows.stable, rod or edge"
        )


def gradient_descent_start(
    dynamics: Dynamics, start: PyTree | Window, flow: str, *, lr: PyTree
) -> State:
    """The centre to start a flow of gradient descent from.

    **Raises** `ValueError` unless the optimizer's update is -lr * gradient, its rate
    constant or on a schedule; the message names the flows that serve others.
    """
    state = centre_of(dynamics, start, lr=lr)
    plain = not has_momentum(state) and not jax.tree.leaves(state.slow)
    rates = _rates(dynamics, state.params, lr=lr) if plain else None
    if rates is None or not _near(rates, rates[0, 0], state.params):
        raise ValueError(
            f"{flow} models gradient descent only (optax.sgd without momentum: the "
            "update is -lr * gradient). For this optimizer use rodjax.flows.stable, "
            "rod, modulated or edge, or central for RMSProp"
        )
    return state


def preconditioned_start(
    dynamics: Dynamics, start: PyTree | Window, flow: str, *, lr: PyTree
) -> State:
    """The centre to start a flow of preconditioned gradient descent from.

    **Raises** `ValueError` unless the update is -P^-1 gradient with P a positive
    diagonal matrix that the second moments and the clock alone decide on.
    """
    state = centre_of(dynamics, start, lr=lr)
    if has_momentum(state) or _rates(dynamics, state.params, lr=lr) is None:
        raise ValueError(
            f"{flow} models gradient descent and RMSProp, plain or scalar, with bias "
            "correction and schedules: no momentum (nor its slot, with b1=0), weight "
            "decay, clipping or signs. For this optimizer use rodjax.flows.stable, "
            "rod, modulated or edge"
        )
    return state


def _rates(dynamics: Dynamics, params: PyTree, *, lr: PyTree) -> np.ndarray | None:
    """-update/gradient of every coordinate at gradients of two sizes; None if not so.

    Tried out on numbers, since what is traced cannot be looked into.
    """

    def nominal(x: Any, value: float) -> Array:
        return jnp.full(jnp.shape(x), value, jnp.result_type(x))

    with jax.ensure_compile_time_eval():
        lr = jax.tree.map(lambda x: nominal(x, NOMINAL), lr)
        zero = dynamics.init(jax.tree.map(lambda x: nominal(x, 0.0), params), lr=lr)
        ones = optax.tree.ones_like(zero.params)
        none = optax.tree.zeros_like(zero.params)
        moved = zero._replace(phase=optax.tree.ones_like(zero.phase))
        drift = dynamics.respond(moved, none, lr=lr).params
        none_after = dynamics.respond(zero, none, lr=lr)
        still = _numbers(drift) == _numbers(ones)
        grad = optax.tree.random_like(jax.random.key(0), zero.params)
        after = lambda size: dynamics.respond(zero, optax.tree.scale(size, grad), lr=lr)
        sizes = (1.0, 1e3)
        if jax.tree.leaves(zero.slow):
            # They answer to the gradient: the rate is that at rest, and it is their
            # rise that has to be quadratic.
            rest = _numbers(none_after.slow)
            law = [(_numbers(after(size).slow) - rest) / size**2 for size in sizes]
            rates = _numbers(inverse_preconditioner(dynamics, zero, lr=lr))[None]
        else:
            law = [-_numbers(after(s).params) / (s * _numbers(grad)) for s in sizes]
            rates = np.stack(law)
    steady = _near(law[0], law[1], params)
    valid = np.all(np.isfinite(rates) & (rates >= 0))
    return rates if np.all(still) and steady and valid else None


def _near(x: np.ndarray, y: Any, params: PyTree) -> bool:
    """Equal as far as the narrowest dtype of the parameters tells."""
    eps = max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params))
    return np.allclose(x, y, rtol=max(1e-3, 4 * eps))


def _numbers(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])
