"""A forecast as a labelled data set, and in print."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rodjax.solve import (
    COMPARED,
    FLOW,
    LOSSES,
    STEP,
    attributes,
    stacked,
    step_coordinate,
)

if TYPE_CHECKING:
    import xarray

LR, END_LOSS, LARGEST = "lr", "end_loss", "largest_lr"
RATIO = "sharpness_ratio"
LONG_NAMES: Mapping[str, str] = {
    END_LOSS: "loss at the end, averaged over the oscillation",
    LARGEST: "largest learning rate up to which none diverges",
    "diverged_at": COMPARED["diverged_at"],
    "evaluations": COMPARED["evaluations"],
}


def labelled(
    found: Mapping[str, Any],
    lrs: NDArray[Any],
    long_names: Mapping[str, str],
    settings: Mapping[str, Any],
) -> "xarray.Dataset":
    """What every model came to at every learning rate, as a data set."""
    import xarray

    models = list(found.values())
    columns: dict[str, tuple[Any, NDArray[Any]]] = {
        name: ((FLOW, LR, STEP), values)
        for name, values in stacked([model.metrics for model in models]).items()
    }
    each = lambda name: np.stack([np.asarray(getattr(m, name)) for m in models])
    lost = each("diverged_at")
    columns[END_LOSS] = ((FLOW, LR), columns["mean_loss"][1][..., -1])
    columns["diverged_at"] = ((FLOW, LR), np.where(np.isinf(lost), np.nan, lost))
    columns["evaluations"] = ((FLOW, LR), each("evaluations"))
    fine = np.logical_and.accumulate(np.isinf(lost), axis=1)
    largest = np.where(fine, lrs, -np.inf).max(axis=1)
    columns[LARGEST] = (FLOW, np.where(np.isinf(largest), np.nan, largest))
    named = {**LOSSES, **LONG_NAMES, **long_names}
    # The run's, for those of a flow of half-step midpoints are half a step later.
    steps = np.floor(np.asarray(models[0].steps)[0])
    return xarray.Dataset(
        {
            name: (dims, values, attributes(name, named))
            for name, (dims, values) in columns.items()
        },
        coords={
            FLOW: list(found),
            LR: (LR, lrs, {"long_name": "learning rate"}),
            STEP: step_coordinate(steps),
        },
        attrs=dict(settings),
    )


def table(data: "xarray.Dataset") -> str:
    """A forecast in print: for each learning rate what each model comes to.

    **Arguments**

    - `data`: from `rodjax.training.forecast`.

    **Returns** lines of text: a row for each learning rate, with the loss at the end
    and, where it was recorded, the sharpness over its threshold there, or the step by
    which the model had diverged; below, the largest learning rate that does not.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: jnp.sum(w**2) / 2)
    >>> options = {"flows": ["stable"], "runs": True, "metrics": ()}
    >>> data = rj.training.forecast(sgd, jnp.ones(2), 40, lrs=[0.1, 0.2, 4], **options)
    >>> print(rj.training.table(data))
    steps 0 to 40; loss at the end
    lr          run                       stable
    0.1         0.0001977                 0.0003357
    0.2         1.449e-08                 1.133e-07
    4           diverged at step 8        4.682e-97
    largest lr  0.2                       4

    ```
    """
    steps = data[STEP].values
    head = f"steps {steps[0]:g} to {steps[-1]:g}; loss at the end"
    head += ", sharpness over threshold" if RATIO in data else ""
    models = [str(name) for name in data[FLOW].values]
    rows = [[LR, *models]]
    for lr in data[LR].values:
        lane = data.sel({LR: lr})
        rows.append([f"{lr:.4g}", *(_cell(lane.sel({FLOW: m})) for m in models)])
    limits = (data[LARGEST].sel({FLOW: model}).item() for model in models)
    rows.append(["largest lr", *(f"{x:.4g}" if x == x else "none" for x in limits)])
    lines = [
        "".join([row[0].ljust(12), *(c.ljust(26) for c in row[1:])]) for row in rows
    ]
    return "\n".join([head, *(line.rstrip() for line in lines)])


def _cell(model: "xarray.Dataset") -> str:
    lost = model["diverged_at"].item()
    if np.isfinite(lost):
        return f"diverged at step {lost:g}"
    loss = f"{model[END_LOSS].item():.4g}"
    return f"{loss}, {model[RATIO].values[-1]:.3f}" if RATIO in model else loss
