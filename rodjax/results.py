"""Trajectories as one labelled xarray data set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rodjax.compare import compare
from rodjax.trajectory import Trajectory

if TYPE_CHECKING:
    import xarray

FLOW, STEP = "flow", "step"

UNITS = {
    "loss": "loss at the centre",
    "mean_loss": "loss averaged over the ends of the oscillation",
    "amplitude": "size of the oscillation of the parameters",
    "sharpness_ratio": "preconditioned sharpness over its stability threshold",
    "residual": "relative residual of the sharpness's eigenpair",
    "predicted_loss": "time-averaged loss that the central flow predicts",
    "predicted_grad_norm": "root-mean-square gradient that the central flow predicts",
    "complementarity": "residual of the central flow's complementarity problem",
    "distance": "distance of the centre from the run's midpoint",
    "final_distance": "last finite distance",
    "mean_distance": "mean distance over the steps",
    "final_loss": "last finite loss at the centre",
    "final_sharpness_ratio": "last finite sharpness over threshold",
    "median_sharpness_ratio": "median sharpness over threshold in the last third",
    "evaluations": "evaluations of the update map",
    "diverged_at": "first step that was not finite",
}


def dataset(
    run: Trajectory, flows: Mapping[str, Trajectory], **settings: Any
) -> "xarray.Dataset":
    """A run and its flows as an xarray data set, ready for `to_netcdf`.

    Dimensions: `flow` ("run" and the flows' names) and `step` (optimizer steps; of a
    flow of half-step midpoints, the step before). Variables: every recorded metric, NaN
    for a flow that lacks it, and `distance` (zero for the run). `settings` become
    attributes.

    **Raises** `ValueError` where `compare` does, `ImportError` without xarray
    (`pip install "rodjax[cli]"`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 3)
    >>> flow = rj.integrate(rj.flows.stable(sgd), jnp.ones(2), 3)
    >>> rj.dataset(run, {"stable": flow}, lr=0.2)["loss"].shape
    (2, 4)

    ```
    """
    import xarray

    comparisons = {name: compare(flow, run) for name, flow in flows.items()}
    metrics: list[Mapping[str, Any]] = [
        run.metrics | {"distance": np.zeros(run.steps.shape)}
    ]
    for name, flow in flows.items():
        metrics.append(flow.metrics | {"distance": comparisons[name].distance})
    return xarray.Dataset(
        {
            name: ((FLOW, STEP), values, attributes(name))
            for name, values in stacked(metrics).items()
        },
        coords={FLOW: ["run", *flows], STEP: step_coordinate(run.steps)},
        attrs=settings,
    )


def stacked(metrics: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The metrics of several models by name, NaN for a model that lacks one."""
    names = dict.fromkeys(name for model in metrics for name in model)
    missing = np.full(np.shape(metrics[0]["loss"]), np.nan)
    return {
        name: np.stack([np.asarray(model.get(name, missing)) for model in metrics])
        for name in names
    }


def attributes(name: str) -> dict[str, str]:
    """What a variable of a result says of itself."""
    return {"long_name": UNITS.get(name, name.replace("_", " "))}


def step_coordinate(steps: Any) -> tuple[str, NDArray[Any], dict[str, str]]:
    """The coordinate of the steps, for xarray."""
    return (STEP, np.asarray(steps), {"units": "optimizer steps"})
