"""A few consecutive optimizer states: where a flow starts from a run."""

from collections.abc import Mapping, Sequence
from math import comb
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._same import compiled
from rodjax.optimizer._state import State, in_floats, widest

#: States on either side of a window's middle.
REACH = 3


@runtime_checkable
class Row(Protocol):
    """Consecutive states about a middle one, as a `Window` holds them."""

    def at(self, ahead: int) -> State:
        """The state at step `step + ahead`."""
        ...


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


def _combine(row: Row, weights: Mapping[int, float]) -> State:
    """The linear combination of the states `row.at(ahead)`, in floats.

    In single precision at least: between two numbers of half a precision there is none
    of it. Of what is neither phase, slow nor clock, the middle state's own.
    """
    states = [in_floats(row.at(ahead))._replace(rest=None) for ahead in weights]

    def mean(*x: Array) -> Array:
        wide = widest(x)
        pairs = zip(weights.values(), x, strict=True)
        first, *others = (w * jnp.astype(y, wide) for w, y in pairs)
        return sum(others, first)

    return jax.tree.map(mean, *states)._replace(rest=in_floats(row.at(0)).rest)


def midpoint(window: Row, ahead: int = 0) -> State:
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
    return _combine(window, {ahead - 1: 0.25, ahead: 0.5, ahead + 1: 0.25})


def half_step_midpoint(window: Row) -> State:
    """Half-step midpoint at `step + 1/2`: (z[t] + z[t+1]) / 2.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(2.0), lambda w: 0.5 * w**2)  # w -> -w
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=3)
    >>> float(rj.half_step_midpoint(window).params)
    0.0

    ```
    """
    return _combine(window, {0: 0.5, 1: 0.5})


def alternating(window: Row, order: int = 2 * REACH, ahead: int = 0) -> State:
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
    return _combine(
        window,
        {
            ahead + j: (-1.0) ** j * comb(order, half + j) / 2.0**order
            for j in range(-half, half + 1)
        },
    )


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
