"""The first steps of a run, after which a comparison begins."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._ring import go_on
from rodjax.optimizer._same import compiled
from rodjax.optimizer._state import State
from rodjax.optimizer._window import REACH, Window


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
    return _gone_on(dynamics, start, steps, lr) if steps else start


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


_gone_on = compiled(go_on)
