"""A picture of a forecast: what comes of each learning rate."""

from typing import TYPE_CHECKING

import numpy as np

from rodjax.report._plot_sweep import LABELS, cells, logarithmic, styles
from rodjax.solve import FLOW, RUN, STEP

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure


def plot_forecast(data: "xarray.Dataset", title: str = "") -> "Figure":
    """Loss and sharpness over threshold at the end, against the learning rate.

    The dotted line in the upper panel is the loss at the start. Where the run itself
    diverged the picture is shaded; crosses at the top mark where a flow did.

    **Arguments**

    - `data`: from `rodjax.training.forecast`. The panel of the preconditioned sharpness
      is empty if it was not recorded.
    - `title`: above the panels.

    **Returns** the matplotlib `Figure`, to show or to save. **Raises** `ImportError`
    without matplotlib (`rodjax[plot]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> data = rj.training.forecast(sgd, jnp.ones(2), 4, lrs=[0.1, 0.2], metrics=())
    >>> len(rj.plot_forecast(data).axes)
    2

    ```
    """
    from matplotlib.figure import Figure

    x = data["lr"].values
    figure = Figure(figsize=(8, 7), layout="constrained")
    figure.suptitle(title)
    end, ratio = figure.subplots(2, 1, sharex=True)
    # Room for the crosses.
    end.set_ymargin(0.15)
    for index, (name, style) in enumerate(styles(data).items()):
        model = data.sel({FLOW: name})
        end.plot(x, model["end_loss"].values, marker="o", ms=3, label=name, **style)
        last = np.full(x.shape, np.nan)
        if "sharpness_ratio" in model:
            last = model["sharpness_ratio"].isel({STEP: -1}).values
        ratio.plot(x, last, marker="o", ms=3, label=name, **style)
        lost = model["diverged_at"].notnull().values
        if name == RUN:
            for edges, gone in zip(cells(x), lost, strict=True):
                for axes in (end, ratio):
                    if gone:
                        axes.axvspan(*edges, color="k", alpha=0.25, lw=0)
        elif lost.any():
            end.plot(
                x[lost],
                np.full(lost.sum(), 0.97 - 0.04 * index),
                "x",
                color=style["color"],
                ms=5,
                transform=end.get_xaxis_transform(),
            )
    # Every model starts from the same states.
    begun = data["mean_loss"].isel({STEP: 0}).median().item()
    end.axhline(begun, color="gray", ls=":", lw=1)
    ratio.axhline(1.0, color="gray", ls=":", lw=1)
    logarithmic(end)
    ratio.set_ylim(bottom=0.0)
    ratio.set_xlabel("learning rate")
    ratio.set_xscale("log")
    ratio.minorticks_off()
    shown = x[:: -(-len(x) // LABELS)]
    ratio.set_xticks(shown, [f"{value:.3g}" for value in shown])
    ratio.legend()
    steps = data[STEP].values
    end.set_title(f"time-averaged loss at step {steps[-1]:g}", fontsize=10)
    ratio.set_title(f"sharpness / threshold at step {steps[-1]:g}", fontsize=10)
    return figure
