"""A few consecutive optimizer states: where a flow starts from a run."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._same import compiled
from rodjax.optimizer._state import State, in_floats

#: States on either side of a window's middle.
REACH = 3


class Window(NamedTuple):
    """The optimizer states at steps `step - 3, ..., step + 3`.

    - `states`: a `State` whose leaves have a leading axis of 7.
    - `step`: the step of the middle state, where the second-order midpoint sits.

    `at(ahead)` is the state at step `step + ahead`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.5), lambda w: 0.5 * w**2)  # w -> -w / 2
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=4)
    >>> float(window.step), float(window.at(0).params), float(window.at(-3).params)
    (4.0, 0.5, -4.0)

    ```
    """

    states: State
    step: Float[Array, ""]

    @classmethod
    def of(
        cls,
        dynamics: Dynamics,
        states: State | Sequence[State],
        *,
        step: ArrayLike,
        lr: PyTree = None,
    ) -> "Window":
        """The window that follows from a state of a run, or from a few in a row.

        The optimizer takes the steps that are missing, so that nothing before the first
        state is made up: one state alone is the first of the window, whose middle is
        three steps later; with the three before it, it is the middle.

        **Arguments**

        - `dynamics`: from `rodjax.dynamics`, of the optimizer that made them.
        - `states`: one `State` (see `State.of`), or consecutive ones, the oldest first,
          of which the last four are used.
        - `step`: the step of the last of them.
        - `lr`: the learning rate, if `dynamics` takes one.

        **Raises** `ValueError` if there is no state, or `step` is negative.

        ```python
        >>> import jax.numpy as jnp, optax, rodjax as rj
        >>> sgd = rj.dynamics(optax.sgd(1.5), lambda w: 0.5 * w**2)  # w -> -w / 2
        >>> state = sgd.init(jnp.array(8.0))
        >>> window = rj.Window.of(sgd, state, step=100)
        >>> float(window.step), float(window.at(-3).params), float(window.at(0).params)
        (103.0, 8.0, -1.0)

        ```
        """
        few = [states] if isinstance(states, State) else list(states)
        if not few:
            raise ValueError("states is empty: a window begins with one state at least")
        if not isinstance(step, Tracer) and np.less(step, 0):
            raise ValueError(f"step must be at least 0, got {step}")
        few = few[-1 - REACH :]
        lr = dynamics.cast(few[-1].params, lr=lr)
        middle = jnp.asarray(step, jnp.result_type(float)) + (REACH + 1 - len(few))
        return Window(_completed(dynamics, few, lr), middle)

    def at(self, ahead: int) -> State:
        """The state at step `step + ahead`, with -3 <= ahead <= 3."""
        return jax.tree.map(lambda x: x[REACH + ahead], self.states)


def _combine(window: Window, weights: list[float], first: int) -> State:
    """The linear combination of consecutive states from `step + first` on, in floats.

    Of what is neither phase, slow nor clock, the middle state's own.
    """
    pick = slice(REACH + first, REACH + first + len(weights))
    states = in_floats(window.states)._replace(rest=None)
    combined = jax.tree.map(
        lambda x: jnp.tensordot(jnp.asarray(weights, x.dtype), x[pick], 1), states
    )
    return combined._replace(rest=in_floats(window.at(0)).rest)


def midpoint(window: Window, ahead: int = 0) -> State:
    """Second-order midpoint at t = `step + ahead`: (z[t-1] + 2 z[t] + z[t+1]) / 4.

    It removes a period-two oscillation of slowly varying amplitude to second order
    (Cohen et al., arXiv 2410.24206).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(2.0), lambda w: 0.5 * w**2)  # w -> -w
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=3)
    >>> float(rj.midpoint(window).params)
    0.0

    ```
    """
    return _combine(window, [0.25, 0.5, 0.25], ahead - 1)


def half_step_midpoint(window: Window) -> State:
    """Half-step midpoint at `step + 1/2`: (z[t] + z[t+1]) / 2.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(2.0), lambda w: 0.5 * w**2)  # w -> -w
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=3)
    >>> float(rj.half_step_midpoint(window).params)
    0.0

    ```
    """
    return _combine(window, [0.5, 0.5], 0)


def alternating(window: Window, order: int = 2 * REACH, ahead: int = 0) -> State:
    """The part that flips sign every step, with its sign at `step + ahead`.

    The scaled finite difference of even `order`, centred there: it leaves an
    alternation of constant amplitude as it is and cuts a smooth part that varies at
    rate r per step by (r / 2)^order. Lower orders mistake the smooth decay of momentum
    for an alternation.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(2.0), lambda w: 0.5 * w**2)  # w -> -w
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=3)
    >>> float(rj.alternating(window).params)
    -8.0

    ```
    """
    half = order // 2
    weights = [
        (-1.0) ** (j - half) * comb(order, j) / 2.0**order for j in range(order + 1)
    ]
    return _combine(window, weights, ahead - half)


@compiled
def _completed(dynamics: Dynamics, few: list[State], lr: PyTree) -> State:
    """The seven consecutive states that these begin."""

    def one(last: State, _: None) -> tuple[State, State]:
        new = dynamics.update(last, lr=lr)
        return new, new

    more = jax.lax.scan(one, few[-1], length=2 * REACH + 1 - len(few))[1]
    return jax.tree.map(
        lambda new, *old: jnp.concatenate([jnp.stack(old), new]), more, *few
    )


def slide(dynamics: Dynamics, window: Window, *, lr: PyTree = None) -> Window:
    """The window one optimizer step later."""
    new = dynamics.update(window.at(REACH), lr=lr)
    states = jax.tree.map(
        lambda x, y: jnp.concatenate([x[1:], y[None]]), window.states, new
    )
    return Window(states, window.step + 1)


def warm_up(
    dynamics: Dynamics, start: PyTree | Window, steps: int = 0, *, lr: PyTree = None
) -> Window:
    """Run the optimizer for `steps` steps and return the window there.

    Before step 0 there are no iterates: they are extrapolated linearly,
    z[-k] = z[0] - k (z[1] - z[0]), which makes the second-order midpoint at 0 the start
    itself; what is not finite there stays z[0].

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`.
    - `start`: the initial parameters, any pytree of floats, or a `Window` to go on
      from.
    - `steps`: optimizer steps before the window, at least 0.
    - `lr`: the learning rate, if `dynamics` takes one.

    **Raises** `ValueError` if `steps` is negative, and what `rodjax.dynamics` says of
    parameters, loss and `lr`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.5), lambda w: 0.5 * w**2)
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=1)
    >>> window.states.params.tolist()
    [32.0, 20.0, 8.0, -4.0, 2.0, -1.0, 0.5]
    >>> float(rj.midpoint(window).params)
    0.5

    ```
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    params = start.at(0).params if isinstance(start, Window) else start
    lr = dynamics.cast(params, lr=lr)
    if not isinstance(start, Window):
        start = _opening(dynamics, jax.tree.map(jnp.asarray, start), lr)
    return _go_on(dynamics, start, steps, lr) if steps else start


def opening(dynamics: Dynamics, params: PyTree, *, lr: PyTree) -> Window:
    """The window at step 0, for a program that compiles it with its own; see `warm_up`.

    Compiled alone it would outlive that program, with the data that its loss holds.
    """
    zero = dynamics.init(params, lr=lr)
    one = dynamics.update(zero, lr=lr)

    def earlier(k: int) -> State:
        """k steps before the start, along the first step where that is finite."""

        def back(x: Array, y: Array) -> Array:
            if not jnp.issubdtype(x.dtype, jnp.number):
                return x
            moved = x - k * (y - x)
            return jnp.where(jnp.isfinite(moved), moved, x)

        moved = jax.tree.map(back, zero, one)
        return moved._replace(rest=zero.rest)

    before = [earlier(k) for k in range(REACH, 0, -1)]
    after = [one]
    for _ in range(REACH - 1):
        after.append(dynamics.update(after[-1], lr=lr))
    states = jax.tree.map(lambda *x: jnp.stack(x), *before, zero, *after)
    return Window(states, jnp.zeros((), jnp.result_type(float)))


@compiled
def _opening(dynamics: Dynamics, params: PyTree, lr: PyTree) -> Window:
    return opening(dynamics, params, lr=lr)


@compiled
def _go_on(dynamics: Dynamics, window: Window, steps: int, lr: PyTree) -> Window:
    # Of fixed length, which reverse-mode differentiation needs.
    one = lambda _, window: slide(dynamics, window, lr=lr)
    return jax.lax.fori_loop(0, steps, one, window)
