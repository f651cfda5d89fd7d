"""What a training loop recorded of its parameters, as a run to compare flows with."""

import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rodjax.flows import stack
from rodjax.linalg import length
from rodjax.optimizer import Loss, compiled
from rodjax.solve import LOSSES, Trajectory

ALONE = (
    "records has no three consecutive steps, so that flows are compared with the "
    "iterates themselves, which at the edge of stability are an oscillation away from "
    "the midpoints that flows predict"
)


def recorded(loss: Loss, records: Iterable[tuple[Any, PyTree]]) -> Trajectory:
    """Parameters recorded by a training loop, as the run of `compare`.

    Flows predict midpoints: record three consecutive steps wherever a comparison is
    wanted, and the moment is the second of them, with the second-order midpoint of the
    three. Of steps without neighbours the moments are the iterates themselves, which at
    the edge are an oscillation's amplitude away from what a flow predicts: a warning
    says so, and so do the long names in a data set; the `amplitude` is NaN.

    **Arguments**

    - `loss`: the loss of the parameters that `rodjax.dynamics` has.
    - `records`: `(step, params)`, the parameters after so many optimizer steps, by
      increasing step; a list or an iterator, of which three at a time are looked at.

    **Returns** a `Trajectory` of T moments with the metrics `loss`, `mean_loss` and
    `amplitude` (of three iterates alone, so that a fast smooth descent counts a little
    as an oscillation too); each leaf of `params` is [T, ...], of `ends` [T, 2, ...] (of
    iterates [T, 1, ...]). There is no `final` to go on from: see `window`. `compare`
    takes what the flow predicts at these steps.

    **Raises** `ValueError` without records, on steps that do not increase, and if some
    of them are of three in a row and others are not, naming those.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: 0.5 * jnp.sum(w**2)
    >>> sgd = rj.dynamics(optax.sgd(0.1), loss)
    >>> records = [(t, 0.9**t * jnp.ones(2)) for t in (9, 10, 11, 19, 20, 21)]
    >>> run = rj.training.recorded(loss, records)
    >>> flow = rj.integrate(rj.flows.modulated(sgd), jnp.ones(2), 20)
    >>> comparison = rj.compare(run, flow)
    >>> comparison.steps.tolist(), bool(comparison.distance[-1] < 1e-3)
    ([10.0, 20.0], True)

    ```
    """
    near: deque[tuple[int, PyTree]] = deque(maxlen=3)
    alone: dict[int, PyTree] = {}
    moments: dict[int, Any] = {}
    for step, params in records:
        now = int(step)
        if near and now <= near[-1][0]:
            raise ValueError(
                f"records: steps must increase, and {now} follows {near[-1][0]}"
            )
        near.append((now, jax.tree.map(jnp.asarray, params)))
        alone[now] = near[-1][1]
        steps = [t for t, _ in near]
        if steps == [now - 2, now - 1, now]:
            moments[now - 1] = _three(loss, *(w for _, w in near))
            for t in steps:
                alone.pop(t, None)
    if not near:
        raise ValueError("records is empty: there is nothing to compare")
    if moments and alone:
        raise ValueError(
            f"records: steps {', '.join(map(str, alone))} are not of three in a row, "
            "as others are: record t - 1, t and t + 1, or leave them out"
        )
    long_names = dict(LOSSES)
    if alone:
        warnings.warn(ALONE, stacklevel=2)
        moments = {step: _one(loss, params) for step, params in alone.items()}
        long_names["loss"] = "loss at the iterate"
        long_names["distance"] = "distance of the centre from the run's iterate"
    params, ends, values = stack(*moments.values())
    steps = jnp.array(list(moments), float)
    lost = ~jnp.isfinite(values["loss"])
    return Trajectory(
        steps=steps,
        params=params,
        ends=ends,
        metrics=values,
        final=None,
        evaluations=jnp.array(jnp.nan),
        diverged_at=jnp.min(jnp.where(lost, steps, jnp.inf)),
        long_names=tuple(long_names.items()),
    )


@compiled
def _three(loss: Loss, before: PyTree, now: PyTree, after: PyTree) -> Any:
    """The moment in the middle of three consecutive iterates."""
    middle = jax.tree.map(lambda x, y, z: (x + 2 * y + z) / 4, before, now, after)
    flips = jax.tree.map(lambda x, y, z: (x - 2 * y + z) / 4, before, now, after)
    mean = (loss(now) + loss(after)) / 2
    values = loss(middle), mean, length(flips)
    return middle, stack(now, after), dict(zip(LOSSES, values, strict=True))


@compiled
def _one(loss: Loss, params: PyTree) -> Any:
    """The moment of an iterate alone."""
    value = loss(params)
    values = value, value, jnp.full_like(value, jnp.nan)
    return params, stack(params), dict(zip(LOSSES, values, strict=True))
