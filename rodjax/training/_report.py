"""What a watched optimizer's state tells, as flat scalars for any logger."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from rodjax.training._quantities import QUANTITIES
from rodjax.training._watch import is_watch


def report(state: PyTree) -> dict[str, Any]:
    """What `watch` has found, as a flat dict of scalars, for any logger.

    **Arguments**

    - `state`: the state of `watch`, or anything that holds it once: the state of a
      chain around it, a `flax.training.train_state.TrainState`, a
      `flax.nnx.Optimizer` or its `opt_state`, the dicts of a checkpoint.

    **Returns** name -> number, [] each (or [lanes] under `jax.vmap`): the quantities
    that `watch` lists, with `_residual`, `_error`, `_batches` or `_floor` behind the
    name, and the name of a group after a slash; `status`, an index into
    `rodjax.training.STATUS`; `probed_at`, the step that the curvature was last looked
    at; `step`, the steps taken. Times are optimizer steps. NaN is what is not known
    (yet). NumPy's outside of a trace, so that it waits for the step to be done.

    **Raises** `ValueError` if the state holds no watch, or more than one.

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * w**2)
    >>> tx = optax.chain(rj.training.watch(optax.sgd(0.5)), optax.identity())
    >>> w = jnp.array([1.0, 1.0])
    >>> _, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> found = rj.training.report(state)
    >>> [round(float(found[name]), 3) for name in ("sharpness_ratio", "realized_edge")]
    [0.75, 0.7]
    >>> rj.training.STATUS[int(found["status"])]
    'below'

    ```
    """
    found: list[Any] = jax.tree.leaves(state, is_leaf=is_watch)
    found = [x for x in found if is_watch(x)]
    if len(found) != 1:
        many = "no watch" if not found else f"{len(found)} watches"
        raise ValueError(
            f"there is {many} in this state, where report wants one: give the state of "
            "an optimizer that rodjax.training.watch was put around"
        )
    (watched,) = found
    fields = watched if isinstance(watched, Mapping) else watched._asdict()
    entries: dict[str, Any] = {}
    for key, kept in fields["values"].items():
        name, slash, group = key.partition("/")
        xp, numbers = _array(kept)
        for ending, x in QUANTITIES[name].read(numbers, xp).items():
            entries[f"{name}{ending}{slash}{group}"] = x
    for name in ("status", "probed_at", "step"):
        entries[name] = _array(fields[name])[1]
    return entries


def _array(x: Any) -> tuple[Any, Any]:
    """The array, of a variable of Flax too; and the module that computes on it."""
    (x,) = jax.tree.leaves(x)
    return (jnp, x) if isinstance(x, Tracer) else (np, np.asarray(x))
