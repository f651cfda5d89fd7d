"""Trajectories as one labelled xarray data set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rodjax.compare import compare
from rodjax.trajectory import Trajectory

if TYPE_CHECKING:
    import xarray

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
}


def dataset(
    run: Trajectory, flows: Mapping[str, Trajectory], **settings: Any
) -> "xarray.Dataset":
    """A run and its flows as an xarray data set, ready for `to_netcdf`.

    Dimensions: `model` ("run" and the flows' names) and `step` (optimizer steps; of a
    flow of half-step midpoints, the step before). Variables: every recorded metric, NaN
    for a model that lacks it, and `distance` (zero for the run). `settings` become
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
    models = [run, *flows.values()]
    names = dict.fromkeys(name for model in models for name in model.metrics)
    missing = np.full(run.steps.shape, np.nan)
    values: dict[str, list[Any]] = {
        name: [model.metrics.get(name, missing) for model in models] for name in names
    }
    values["distance"] = [
        np.zeros(run.steps.shape),
        *(comparison.distance for comparison in comparisons.values()),
    ]
    return xarray.Dataset(
        {
            name: (
                ("model", "step"),
                np.stack([np.asarray(row) for row in rows]),
                {"long_name": UNITS.get(name, name)},
            )
            for name, rows in values.items()
        },
        coords={
            "model": ["run", *flows],
            "step": ("step", np.asarray(run.steps), {"units": "optimizer steps"}),
        },
        attrs=settings,
    )
