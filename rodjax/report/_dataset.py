"""Trajectories as one labelled xarray data set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rodjax.solve import (
    COMPARED,
    FLOW,
    NUDGED,
    RUN,
    STEP,
    Comparison,
    Trajectory,
    attributes,
    compare,
    stacked,
    step_coordinate,
)

if TYPE_CHECKING:
    import xarray

DISTANCE = "distance"


def dataset(
    run: Trajectory,
    flows: Mapping[str, Trajectory],
    *,
    predictability: Comparison | None = None,
    **settings: Any,
) -> "xarray.Dataset":
    """A run and its flows as an xarray data set, ready for `to_netcdf`.

    Dimensions: `flow` ("run" and the flows' names) and `step` (optimizer steps; of a
    flow of half-step midpoints, the step before). Variables: every recorded metric, NaN
    for a flow that lacks it, `distance` (zero for the run), and `diverged_at`, of each
    the step by which it had diverged, NaN if it never did. `settings` become
    attributes. With `predictability`, from `rodjax.predictability`, there is one more
    entry, "limit", whose `distance` is that of the run from itself.

    **Raises** `ValueError` where `compare` does and where the trajectories have several
    lanes; `ImportError` without xarray (`pip install "rodjax[sweep]"`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 3)
    >>> flow = rj.integrate(rj.flows.stable(sgd), jnp.ones(2), 3)
    >>> rj.dataset(run, {"stable": flow}, lr=0.2)["loss"].shape
    (2, 4)

    ```
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "dataset needs xarray: pip install 'rodjax[sweep]'"
        ) from error
    if np.ndim(run.steps) != 1:
        raise ValueError(
            f"run has several lanes, steps of shape {np.shape(run.steps)}: give one of "
            "them, jax.tree.map(lambda x: x[0], run), or use rodjax.sweep for a grid"
        )

    comparisons = {name: compare(run, flow) for name, flow in flows.items()}
    metrics: list[Mapping[str, Any]] = [
        run.metrics | {DISTANCE: np.zeros(run.steps.shape)}
    ]
    for found in comparisons.values():
        metrics.append(found.flow | {DISTANCE: found.distance})
    paths = {RUN: run, **flows}
    lost = [float(path.diverged_at) for path in paths.values()]
    if predictability is not None:
        metrics.append({DISTANCE: predictability.distance})
        lost.append(float(predictability.diverged_at))
    long_names = dict(COMPARED)
    for path in (*flows.values(), run):
        long_names |= dict(path.long_names)
    columns: dict[str, tuple[Any, Any]] = {
        name: ((FLOW, STEP), values) for name, values in stacked(metrics).items()
    }
    columns["diverged_at"] = (FLOW, np.where(np.isinf(lost), np.nan, lost))
    return xarray.Dataset(
        {
            name: (dims, values, attributes(name, long_names))
            for name, (dims, values) in columns.items()
        },
        coords={
            FLOW: [*paths, *([] if predictability is None else [NUDGED])],
            STEP: step_coordinate(run.steps),
        },
        attrs=settings,
    )
