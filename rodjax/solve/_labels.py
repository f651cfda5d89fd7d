"""Names of a labelled result: its dimensions, and what its variables say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rodjax.flows import Flow
from rodjax.optimizer import Dynamics

FLOW, STEP = "flow", "step"
#: The optimizer's own entry among the flows.
RUN = "run"
#: Its distance to itself, nudged by a rounding error, among them.
NUDGED = "limit"


def check_flows(dynamics: Dynamics, flows: Mapping[str, Flow]) -> None:
    """Raise `ValueError` for a flow of other dynamics, or one called as the run is."""
    for name, flow in flows.items():
        if name == RUN:
            raise ValueError("flows: 'run' is the name of the optimizer's own entry")
        if flow.dynamics != dynamics:
            raise ValueError(
                f"flow {name!r} is of other dynamics: build it from those given here"
            )


def stacked(metrics: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """The metrics of several models by name, NaN for a model that lacks one."""
    names = dict.fromkeys(name for model in metrics for name in model)
    missing = np.full(np.shape(metrics[0]["loss"]), np.nan)
    return {
        name: np.stack([np.asarray(model.get(name, missing)) for model in metrics])
        for name in names
    }


def attributes(name: str, long_names: Mapping[str, str]) -> dict[str, str]:
    """What a variable of a result says of itself."""
    return {"long_name": long_names.get(name, name.replace("_", " "))}


def step_coordinate(steps: Any) -> tuple[str, NDArray[Any], dict[str, str]]:
    """The coordinate of the steps, for xarray."""
    return (STEP, np.asarray(steps), {"units": "optimizer steps"})
