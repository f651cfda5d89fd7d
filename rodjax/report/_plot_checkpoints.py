"""A picture of where the checkpoints of a run stand."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure


def plot_checkpoints(data: "xarray.Dataset", title: str = "") -> "Figure":
    """Loss, sharpness over threshold and realized edge against optimizer steps.

    Dotted lines are the edge of stability: 1 in both. The points of the middle panel
    are coloured by status.

    **Arguments**

    - `data`: `loss`, `status` and, where they are known, `sharpness_ratio` and
      `realized_edge`, all [step]; and the attribute `status_names`, what `status` is
      an index into. As `rodjax inspect` writes them to result.nc.
    - `title`: above the panels.

    **Returns** the matplotlib `Figure`, to show or to save. **Raises** `ImportError`
    without matplotlib (`rodjax[plot]`).

    ```python
    >>> import rodjax as rj, xarray
    >>> columns = {"loss": ("step", [2.0, 1.0]), "status": ("step", [0, 1])}
    >>> names = {"status_names": ["below", "at the edge"]}
    >>> data = xarray.Dataset(columns, {"step": [100, 200]}, names)
    >>> len(rj.plot_checkpoints(data).axes)
    3

    ```
    """
    from matplotlib.figure import Figure

    steps = data["step"].values
    figure = Figure(figsize=(8, 7), layout="constrained")
    figure.suptitle(title)
    loss, ratio, zeta = figure.subplots(3, 1, sharex=True)
    loss.plot(steps, data["loss"].values, "k", marker="o", ms=3)
    if np.any(data["loss"].values > 0):
        loss.set_yscale("log")
    for axes, name in ((ratio, "sharpness_ratio"), (zeta, "realized_edge")):
        axes.axhline(1.0, color="gray", ls=":", lw=1)
        if name in data:
            axes.plot(steps, data[name].values, "gray", lw=1, marker="o", ms=3)
    if "sharpness_ratio" in data:
        codes = data["status"].values
        for code in np.unique(codes):
            there, name = codes == code, data.attrs["status_names"][int(code)]
            shown = data["sharpness_ratio"].values[there]
            ratio.plot(
                steps[there], shown, "o", ms=5, color=f"C{int(code)}", label=name
            )
        ratio.legend(fontsize=8)
        ratio.set_ylim(bottom=0.0)
    for axes, label in (
        (loss, "loss"),
        (ratio, "sharpness / threshold"),
        (zeta, "realized edge"),
    ):
        axes.set_title(label, fontsize=10)
    zeta.set_xlabel("optimizer steps")
    return figure
