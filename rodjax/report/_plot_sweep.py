"""Pictures of a sweep: where each model breaks down, and its lanes one by one."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rodjax.solve import FLOW, NUDGED, RUN, STEP

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DISTANCE, RATIO = "final_distance", "median_sharpness_ratio"
#: Panels of `plot_lanes` at most, and in a row.
PANELS, COLUMNS = 16, 4
#: Values of `plot_sweep` with a label at most.
LABELS = 9


def plot_sweep(data: "xarray.Dataset", along: str = "lr", title: str = "") -> "Figure":
    """Distance of the flows, and sharpness over threshold, against a hyperparameter.

    Lines are medians over the other axes of the grid, bands reach from the least to the
    largest, both over lanes in which neither the run nor the flow diverged. Where the
    run diverged the picture is shaded, the darker the more lanes; crosses at the top
    mark where a flow did though the run did not. The predictability limit, of a sweep
    with it, is dashed.

    **Arguments**

    - `data`: from `rodjax.sweep`. The panel of the preconditioned sharpness is empty
      unless it was called with `metrics=[edge_of_stability(dynamics)]`.
    - `along`: the coordinate to plot against; if there is none of that name, the first
      dimension of the grid.
    - `title`: above the panels.

    **Returns** the matplotlib `Figure`, to show or to save. **Raises** `ImportError`
    without matplotlib (`rodjax[plot]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> flows = {"stable": rj.flows.stable(sgd)}
    >>> data = rj.sweep(sgd, jnp.ones(2), 3, grid={"lr": [0.1, 0.2]}, flows=flows)
    >>> len(rj.plot_sweep(data).axes)
    2

    ```
    """
    from matplotlib.figure import Figure

    data, along, dim = abscissa(data, along)
    x = data[along].values
    figure = Figure(figsize=(8, 7), layout="constrained")
    figure.suptitle(title)
    distance, ratio = figure.subplots(2, 1, sharex=True)
    # Room for the crosses.
    distance.set_ymargin(0.15)
    for name, style in styles(data).items():
        for axes, key in ((distance, DISTANCE), (ratio, RATIO)):
            if axes is distance and name == RUN:
                continue
            low, middle, high = spread(alive(data, key, name), dim)
            axes.plot(x, middle, marker="o", ms=3, label=name, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
    logarithmic(distance)
    lost = _share_lost(data, dim)
    for axes in (distance, ratio):
        for edges, share in zip(cells(x), lost[RUN], strict=True):
            if share:
                axes.axvspan(*edges, color="k", alpha=0.25 * share, lw=0)
    for index, (name, style) in enumerate(styles(data).items()):
        where = x[lost[name] > 0]
        if name != RUN and where.size:
            distance.plot(
                where,
                np.full(where.shape, 0.97 - 0.04 * index),
                "x",
                color=style["color"],
                ms=5,
                transform=distance.get_xaxis_transform(),
            )
    ratio.axhline(1.0, color="gray", ls=":", lw=1)
    ratio.set_ylim(bottom=0.0)
    ratio.set_xlabel(along)
    if np.all(x > 0):
        ratio.set_xscale("log")
        ratio.minorticks_off()
    # Labels at values of the grid: between them nothing is known.
    shown = x[:: -(-len(x) // LABELS)]
    ratio.set_xticks(shown, [f"{value:.3g}" for value in shown])
    ratio.legend()
    distance.set_title("final distance to the midpoints", fontsize=10)
    ratio.set_title("sharpness / threshold, median of the last third", fontsize=10)
    return figure


def plot_lanes(data: "xarray.Dataset", along: str = "lr", title: str = "") -> "Figure":
    """Sharpness over threshold against optimizer steps, a panel for each lane.

    Shaded from where the run diverged, which is said; the panels are as high as the
    lanes without divergence need.

    **Arguments**

    - `data`: from `rodjax.sweep`, called with `metrics=[edge_of_stability(dynamics)]`.
    - `along`: the coordinate whose values the panels show, at most 16 and evenly
      picked; if there is none of that name, the first dimension of the grid. The other
      axes are at their first values.
    - `title`: above the panels.

    **Returns** the matplotlib `Figure`, to show or to save. **Raises** `ImportError`
    without matplotlib (`rodjax[plot]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> edge = rj.edge_of_stability(sgd)
    >>> data = rj.sweep(sgd, jnp.ones(2), 3, grid={"lr": [0.1, 0.2]}, metrics=[edge])
    >>> [axes.get_title() for axes in rj.plot_lanes(data).axes]
    ['lr 0.1', 'lr 0.2']

    ```
    """
    from matplotlib.figure import Figure

    data, along, dim = abscissa(data, along)
    picked = evenly(data.sizes[dim], PANELS)
    first = {name: 0 for name in data.diverged_at.dims if name not in (FLOW, dim)}
    lanes, columns = data.isel(first), min(len(picked), COLUMNS)
    rows = -(-len(picked) // columns)
    size = (1 + 2.6 * columns, 1 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(picked) :]:
        axes.remove()
    for axes, index in zip(panels.flat, picked, strict=False):
        lane = lanes.isel({dim: index})
        for name, style in styles(data).items():
            ratio = _of(lane, "sharpness_ratio", name)
            axes.plot(data[STEP].values, ratio.values, label=name, **style)
        axes.axhline(1.0, color="gray", ls=":", lw=1)
        lost = float(lane.diverged_at.sel({FLOW: RUN}))
        if np.isfinite(lost):
            axes.axvspan(lost, data[STEP].values[-1], color="k", alpha=0.25, lw=0)
            said = f"diverged at step {lost:g}"
            axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", fontsize=8)
        axes.set_title(f"{along} {lane[along].item():.3g}", fontsize=10)
    models = [alive(lanes, "sharpness_ratio", name) for name in styles(data)]
    highest = np.array([spread(ratio, dim)[2] for ratio in models])
    # What a lost lane reaches would flatten all others.
    if np.any(np.isfinite(highest)):
        panels.flat[0].set_ylim(0.0, 1.1 * max(1.0, np.nanmax(highest)))
    figure.supxlabel("optimizer steps", fontsize=10)
    figure.supylabel("sharpness / threshold", fontsize=10)
    panels.flat[0].legend(fontsize=8)
    return figure


def abscissa(data: "xarray.Dataset", along: str) -> tuple["xarray.Dataset", str, str]:
    """The data in the order of a coordinate, the coordinate, and its dimension.

    The coordinate is `along`, or the grid's first dimension in place of one that does
    not vary.
    """
    dims = [str(name) for name in data.diverged_at.dims if name != FLOW]
    if not dims:
        data = data.expand_dims(along if along in data.coords else {"lane": [0]})
        dims = [along if along in data.coords else "lane"]
    if along not in data.coords or not data[along].dims:
        along = dims[0]
    return data.sortby(along), along, str(data[along].dims[0])


def alive(data: "xarray.Dataset", key: str, model: str) -> "xarray.DataArray":
    """A variable of a model, NaN in lanes in which it or the run diverged."""
    lost = data.diverged_at.notnull()
    either = lost.sel({FLOW: model}) | lost.sel({FLOW: RUN})
    return _of(data, key, model).where(~either)


def spread(values: "xarray.DataArray", dim: str) -> NDArray[Any]:
    """Least, median and largest of the finite values along a dimension, [3, length]."""
    found = []
    for row in by_row(values, dim):
        finite = row[np.isfinite(row)]
        found.append(
            [finite.min(), np.median(finite), finite.max()]
            if finite.size
            else [np.nan] * 3
        )
    return np.array(found).T


def by_row(values: "xarray.DataArray", dim: str) -> NDArray[Any]:
    """The values along a dimension and all others as one, [length, others]."""
    return values.transpose(dim, ...).values.reshape(values.sizes[dim], -1)


def evenly(count: int, most: int) -> list[int]:
    """At most so many indices of `count`, the ends among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _of(data: "xarray.Dataset", key: str, model: str) -> "xarray.DataArray":
    """A variable of a model, NaN if it was not recorded."""
    like = data.diverged_at if key in (DISTANCE, RATIO) else data.distance
    return (data[key] if key in data else like * np.nan).sel({FLOW: model})


def _share_lost(data: "xarray.Dataset", dim: str) -> dict[str, NDArray[Any]]:
    """Model -> the share of lanes that it lost, along a dimension.

    Of a flow only where the run did not diverge: nothing could follow it there.
    """
    lost = data.diverged_at.notnull()
    run = lost.sel({FLOW: RUN})
    shares = {RUN: run}
    for name in map(str, data[FLOW].values):
        if name != RUN:
            shares[name] = lost.sel({FLOW: name}) & ~run
    return {name: by_row(share, dim).mean(1) for name, share in shares.items()}


def styles(data: "xarray.Dataset") -> dict[str, dict[str, Any]]:
    """How each model is drawn, the run first."""
    names = [str(name) for name in data[FLOW].values]
    flows = [name for name in names if name not in (RUN, NUDGED)]
    colors = {name: {"color": f"C{index}"} for index, name in enumerate(flows)}
    run = {RUN: {"color": "k", "lw": 2.5, "alpha": 0.5}} if RUN in names else {}
    limit = {NUDGED: {"color": "gray", "ls": "--"}} if NUDGED in names else {}
    return {**run, **colors, **limit}


def cells(x: NDArray[Any]) -> list[tuple[float, float]]:
    """Around every point of `x`, up to half way to its neighbours."""
    scale, back = (np.log, np.exp) if np.all(x > 0) else (np.asarray, np.asarray)
    at = scale(x)
    gaps = np.diff(at) if len(at) > 1 else np.array([0.1])
    ends = [at[0] - gaps[0] / 2, *(at[1:] + at[:-1]) / 2, at[-1] + gaps[-1] / 2]
    edges = back(np.array(ends))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def logarithmic(axes: "Axes") -> None:
    # Where everything diverged there is nothing to scale.
    if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.get_lines()):
        axes.set_yscale("log", nonpositive="mask")
