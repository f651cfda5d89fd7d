"""One picture of a run beside its flows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rodjax.report._dataset import DISTANCE
from rodjax.solve import FLOW, NUDGED, RUN, STEP, Comparison, Trajectory, compare

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(
    run: Trajectory,
    flows: Trajectory | Mapping[str, Trajectory],
    title: str = "",
    *,
    predictability: Comparison | None = None,
) -> "Figure":
    """Loss, sharpness over threshold, distance and amplitude against optimizer steps.

    **Arguments**

    - `run`: from `rodjax.descend`.
    - `flows`: one from `rodjax.integrate`, or several by name. The panel of the
      preconditioned sharpness is empty unless all were recorded with
      `metrics=[edge_of_stability(dynamics)]`.
    - `title`: above the panels.
    - `predictability`: from `rodjax.predictability`, as for `compare`; distances below
      its own, where nothing can predict the run, are shaded.

    **Returns** the matplotlib `Figure`, to show or to save. **Raises** `ValueError`
    where `compare` does, `ImportError` without matplotlib (`rodjax[plot]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 3)
    >>> flow = rj.integrate(rj.flows.stable(sgd), jnp.ones(2), 3)
    >>> len(rj.plot(run, flow).axes)
    4

    ```
    """
    named = {"flow": flows} if isinstance(flows, Trajectory) else dict(flows)
    models = {RUN: _curves(run)}
    for name, flow in named.items():
        compared = compare(run, flow, predictability=predictability)
        models[name] = _curves(flow) | {DISTANCE: compared.distance}
    if predictability is not None:
        models[NUDGED] = {DISTANCE: predictability.distance}
    return _drawn(run.steps, models, title)


def plot_run(data: "xarray.Dataset", title: str = "") -> "Figure":
    """The same of a labelled result: of `dataset`, or one lane of a sweep's."""
    names = ("mean_loss", "amplitude", "sharpness_ratio", DISTANCE, "diverged_at")
    recorded = [name for name in names if name in data]
    models = {}
    for name in data[FLOW].values:
        model = data.sel({FLOW: name})
        values = {key: model[key].values for key in recorded}
        models[str(name)] = {STEP: data[STEP].values} | values
    return _drawn(data[STEP].values, models, title)


def _curves(path: Trajectory) -> dict[str, Any]:
    return path.metrics | {STEP: path.steps, "diverged_at": path.diverged_at}


def _drawn(steps: Any, models: Mapping[str, Mapping[str, Any]], title: str) -> "Figure":
    """The four panels; the run is the first of the models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    (loss, ratio), (distance, amplitude) = figure.subplots(2, 2, sharex=True)
    limit = models.get(NUDGED)
    shown = {name: model for name, model in models.items() if name != NUDGED}
    for index, (name, model) in enumerate(shown.items()):
        style = {"color": f"C{index - 1}"}
        if name == RUN:
            style = {"color": "k", "lw": 2.5, "alpha": 0.5}
        else:
            distance.plot(steps, _positive(model[DISTANCE]), **style)
        loss.plot(model[STEP], model["mean_loss"], label=name, **style)
        amplitude.plot(model[STEP], _positive(model["amplitude"]), **style)
        if "sharpness_ratio" in model:
            ratio.plot(model[STEP], model["sharpness_ratio"], **style)
    ratio.axhline(1.0, color="gray", ls=":", lw=1)
    for axes, label in (
        (loss, "time-averaged loss"),
        (ratio, "sharpness / threshold"),
        (distance, "distance to the midpoints"),
        (amplitude, "oscillation amplitude"),
    ):
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer steps")
        drawn = [line.get_ydata() for line in axes.get_lines()]
        # Where everything diverged at once there is nothing to scale.
        if axes is not ratio and any(np.any(np.asarray(y) > 0) for y in drawn):
            axes.set_yscale("log")
    if limit is not None:
        _shade(distance, steps, _positive(limit[DISTANCE]))
    lost = {name: float(model["diverged_at"]) for name, model in shown.items()}
    lines = [f"{n} diverged at step {t:g}" for n, t in lost.items() if np.isfinite(t)]
    loss.text(0.02, 0.02, "\n".join(lines), transform=loss.transAxes, fontsize=8)
    loss.legend()
    return figure


def _shade(axes: "Axes", steps: Any, limit: np.ndarray) -> None:
    """What lies below the limit, in grey, as far down as the flows reach."""
    if not np.any(limit > 0):
        return
    if axes.get_lines():
        bottom, top = axes.get_ylim()
    else:
        axes.set_yscale("log")
        bottom, top = np.nanmin(limit), np.nanmax(limit)
    axes.fill_between(
        steps,
        bottom,
        limit,
        where=limit > bottom,
        color="k",
        alpha=0.15,
        lw=0,
        label="predictability limit",
    )
    axes.set_ylim(bottom, max(top, np.nanmax(limit)))
    axes.legend(fontsize=8)


def _positive(values) -> np.ndarray:
    """Zeros, which a logarithmic axis cannot show, left out."""
    values = np.asarray(values)
    return np.where(values > 0, values, np.nan)
