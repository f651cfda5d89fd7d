"""From a checkpoint of a training loop to where a flow starts."""

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path
from jax.typing import ArrayLike
from jaxtyping import PyTree

from rodjax.optimizer import REACH, Dynamics, State, Window, merge
from rodjax.training._full_batch import check_full_batch
from rodjax.training._watch import WatchState, is_watch


def window(
    dynamics: Dynamics,
    params: PyTree,
    opt_state: PyTree,
    *,
    step: ArrayLike,
    lr: PyTree = None,
    before: Iterable[tuple[PyTree, PyTree]] = (),
) -> Window:
    """The window that goes on from a checkpoint: a start for `integrate`, `descend`.

    The optimizer goes on as it is, with its moments, its step count and so its place in
    a schedule, where a start from the parameters alone would begin all that anew. It
    takes the steps that the window lacks: of one state the window's middle, and so the
    first saved moment, is three steps later. For a first moment at the checkpoint
    itself give the three states before it as well.

    Flows model full-batch training. Of a run of mini-batches the moments hold the noise
    of their batches, and a flow on the full batch does not have it: started from such a
    checkpoint a flow predicted the next 200 steps no better than the stable flow, 1.31
    against 1.32 off, of a distance travelled of 5.25.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`, of the optimizer without `watch` around it,
      and of a loss of the parameters alone.
    - `params`: the parameters as that loss takes them.
    - `opt_state`: the optimizer's state as the training loop or a checkpoint has it:
      plain Optax's, that of `TrainState` or `flax.nnx.Optimizer`, or the dicts and
      lists of a file; with or without `watch` around any part of it.
    - `step`: optimizer steps that had been taken.
    - `lr`: the learning rate that the run had, if `dynamics` takes one.
    - `before`: `(params, opt_state)` of the consecutive steps before this one, the
      oldest first: any iterable, of which the last three are kept and used.

    **Returns** a `Window` in optimizer steps, whose `states` have a leading axis of 7.

    **Raises** `ValueError` that names the leaf: one missing, unknown, of another shape
    or kind of number, of parameters or moments that are not finite; `ValueError` too on
    a negative `step`, states `before` that are not consecutive, `dynamics` with `watch`
    inside, a loss that is not the same when asked twice.

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> loss, optimizer = lambda w: jnp.sum(w**4), optax.adam(0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> opt_state = optimizer.init(params)
    >>> for _ in range(20):  # a training loop
    ...     updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
    ...     params = optax.apply_updates(params, updates)
    >>> dynamics = rj.dynamics(optimizer, loss)
    >>> start = rj.training.window(dynamics, params, opt_state, step=20)
    >>> run = rj.descend(dynamics, start, 4)
    >>> flow = rj.integrate(rj.flows.modulated(dynamics), start, 4)
    >>> run.steps.tolist(), bool(rj.compare(run, flow).distance[-1] < 1e-2)
    ([23.0, 24.0, 25.0, 26.0, 27.0], True)

    ```
    """
    _check_unwatched(dynamics, params, lr)
    check_full_batch(dynamics.loss, params)
    few = list(deque(before, maxlen=REACH))
    states = []
    for index, pair in enumerate(few, -len(few)):
        try:
            states.append(_state(dynamics, *pair, lr=lr))
        except ValueError as error:
            raise ValueError(f"before[{index}]: {error}") from error
    states.append(_state(dynamics, params, opt_state, lr=lr))
    _check_consecutive(states)
    return Window.of(dynamics, states, step=step, lr=lr)


def unwatched(opt_state: PyTree) -> PyTree:
    """An optimizer's state without what `watch` keeps, wherever that is nested."""

    def inner(node: Any) -> Any:
        if isinstance(node, WatchState):
            return unwatched(node.inner)
        return unwatched(node["inner"]) if is_watch(node) else node

    return jax.tree.map(inner, opt_state, is_leaf=is_watch)


def _state(
    dynamics: Dynamics, params: PyTree, opt_state: PyTree, *, lr: PyTree
) -> State:
    state = State.of(dynamics, params, unwatched(opt_state), lr=lr)
    _check_finite(state)
    return state


def _check_unwatched(dynamics: Dynamics, params: PyTree, lr: PyTree) -> None:
    shapes = jax.eval_shape(lambda p: merge(dynamics.init(p, lr=lr))[1], params)
    if any(map(is_watch, jax.tree.leaves(shapes, is_leaf=is_watch))):
        raise ValueError(
            "dynamics is of an optimizer with watch around it, whose report no flow "
            "can carry: give rodjax.dynamics the optimizer inside"
        )


def _check_finite(state: State) -> None:
    """Of what flows move; a constant may be infinite in good health."""
    for part in (state.phase, state.slow):
        for path, leaf in tree_leaves_with_path(part):
            if isinstance(leaf, Tracer) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            bad = int(np.sum(~np.asarray(jnp.isfinite(leaf))))
            if bad:
                name = ("params", "opt_state")[path[0].idx] + keystr(path[1:])
                raise ValueError(
                    f"{name} is not finite in {bad} of its {leaf.size} entries: the "
                    "run had diverged by then. Take an earlier checkpoint"
                )


def _check_consecutive(states: list[State]) -> None:
    """As far as the optimizer counts its steps."""
    for old, new in pairwise(states):
        counts = zip(
            tree_leaves_with_path(old.clock), jax.tree.leaves(new.clock), strict=True
        )
        for (path, x), y in counts:
            if not isinstance(x, Tracer | type(None)) and int(y) - int(x) != 1:
                raise ValueError(
                    "before: states must be of consecutive steps, and opt_state"
                    f"{keystr(path[1:])} goes from {int(x)} to {int(y)}"
                )
