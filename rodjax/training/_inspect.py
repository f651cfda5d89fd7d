"""Where a run that was trained elsewhere stood, checkpoint by checkpoint."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import jax
import optax
from jaxtyping import PyTree

from rodjax.optimizer import Loss, State, dynamics, fitted, merge
from rodjax.training._report import report
from rodjax.training._watch import WatchState, watch
from rodjax.training._window import unwatched

# Of steps in a row, which checkpoints are not.
IN_A_ROW = "oscillation"


def inspect(
    optimizer: optax.GradientTransformation,
    loss: Loss,
    params: PyTree,
    checkpoints: Iterable[tuple[int, PyTree, PyTree]],
    *,
    products: int = 30,
) -> Iterator[dict[str, Any]]:
    """Where each checkpoint of a run stands on this loss, as `watch` would have said.

    From each, the optimizer is asked for its next step, on the whole `loss`; the
    direction of the last one is where the search for the next sharpness starts.

    **Arguments**

    - `optimizer`: that of the run, without `watch`.
    - `loss`: of the parameters alone, on a fixed set of samples.
    - `params`: parameters of the structure, shapes and dtypes that `loss` takes.
    - `checkpoints`: `(step, params, opt_state)`, such as `rodjax.training.checkpoints`
      gives, with or without `watch` around the optimizer; in the order of their steps.
    - `products`: Hessian-vector products to spend on each.

    **Returns** an iterator of flat dicts of numbers: `step`, `loss`, and what
    `rodjax.training.report` has of `update_ratio`, `realized_edge`, `step_curvature`,
    `sharpness_ratio` and `status`, an index into `rodjax.training.STATUS`.

    **Raises** `ValueError` that names the leaf, for a checkpoint of another model or
    optimizer.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * w**2)
    >>> sgd, w = optax.sgd(0.5), jnp.array([1.0, 1.0])
    >>> saved = [(100, w, sgd.init(w)), (200, w / 2, sgd.init(w))]
    >>> for found in rj.training.inspect(sgd, loss, w, saved):
    ...     print(found["step"], round(float(found["sharpness_ratio"]), 3))
    100 0.75
    200 0.75

    ```
    """
    watched = watch(optimizer, every=1, products=products)
    system = dynamics(optimizer, loss)

    @jax.jit
    def look(state: WatchState, params: PyTree) -> tuple[Any, WatchState]:
        value, grad = jax.value_and_grad(loss)(params)
        extra: Any = {"value": value, "value_fn": loss}
        return value, cast(WatchState, watched.update(grad, state, params, **extra)[1])

    state = cast(WatchState, watched.init(params))
    for step, given, opt_state in checkpoints:
        own = fitted(given, params, f"checkpoint {step}: params")
        inner = merge(State.of(system, own, unwatched(opt_state)))[1]
        value, state = look(state._replace(inner=inner), own)
        found = {k: v for k, v in report(state).items() if not k.startswith(IN_A_ROW)}
        yield found | {"step": step, "loss": float(value)}
