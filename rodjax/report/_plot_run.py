"""One picture of a run beside its flows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rodjax.solve import Comparison, Trajectory, compare

if TYPE_CHECKING:
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
    from matplotlib.figure import Figure

    named = {"flow": flows} if isinstance(flows, Trajectory) else dict(flows)
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    (loss, ratio), (distance, amplitude) = figure.subplots(2, 2, sharex=True)

    loss.plot(run.steps, run.metrics["mean_loss"], "k", lw=2.5, alpha=0.5, label="run")
    amplitude.plot(run.steps, run.metrics["amplitude"], "k", lw=2.5, alpha=0.5)
    if "sharpness_ratio" in run.metrics:
        ratio.plot(run.steps, run.metrics["sharpness_ratio"], "k", lw=2.5, alpha=0.5)
    for index, (name, flow) in enumerate(named.items()):
        color = f"C{index}"
        loss.plot(flow.steps, flow.metrics["mean_loss"], color, label=name)
        amplitude.plot(flow.steps, _positive(flow.metrics["amplitude"]), color)
        distance.plot(
            run.steps,
            _positive(compare(run, flow, predictability=predictability).distance),
            color,
        )
        if "sharpness_ratio" in flow.metrics:
            ratio.plot(flow.steps, flow.metrics["sharpness_ratio"], color)
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
    if predictability is not None:
        _shade(distance, predictability)
    lost = {"run": run.diverged_at} | {n: flow.diverged_at for n, flow in named.items()}
    lines = [f"{n} diverged at step {t:g}" for n, t in lost.items() if np.isfinite(t)]
    loss.text(0.02, 0.02, "\n".join(lines), transform=loss.transAxes, fontsize=8)
    loss.legend()
    return figure


def _shade(axes: "Axes", predictability: Comparison) -> None:
    """What lies below the limit, in grey, as far down as the flows reach."""
    limit = _positive(predictability.distance)
    if not np.any(limit > 0):
        return
    if axes.get_lines():
        bottom, top = axes.get_ylim()
    else:
        axes.set_yscale("log")
        bottom, top = np.nanmin(limit), np.nanmax(limit)
    axes.fill_between(
        predictability.steps,
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
