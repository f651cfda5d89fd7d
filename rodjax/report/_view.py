"""A result as one page for a browser, whose panels zoom together."""

import html
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rodjax.report._plot_sweep import evenly
from rodjax.report._view_layout import (
    Panel,
    axis,
    color,
    layout,
    lost,
    sliders,
    styles,
)
from rodjax.solve import FLOW, RUN, STEP

if TYPE_CHECKING:
    import xarray


PANELS = {
    "mean_loss": Panel("time-averaged loss"),
    "sharpness_ratio": Panel("sharpness / threshold", log=False),
    "distance": Panel("distance to the midpoints"),
    "amplitude": Panel("oscillation amplitude"),
}
CHECKPOINTS = {
    "loss": Panel("loss"),
    "sharpness_ratio": Panel("sharpness / threshold", log=False),
    "realized_edge": Panel("realized edge", log=False),
}
#: Numbers in a page at most; what has more is shown at fewer values of its grid.
MOST = 2_000_000
# Without a button that would upload the data.
CONFIG = {"displaylogo": False, "responsive": True, "showSendToCloud": False}
# Which frame is shown follows from all sliders together; one that is cut short by the
# next has its promise rejected.
SLIDE = """
const page = document.getElementById("{plot_id}");
page.on("plotly_sliderchange", () => {
  const frame = page.layout.sliders.map((slider) => slider.active).join();
  const now = {mode: "immediate", transition: {duration: 0},
    frame: {duration: 0, redraw: true}};
  Plotly.animate(page, [frame], now).catch(() => {});
});
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
</head>
<body>
{body}
</body>
</html>
"""


def view(data: "xarray.Dataset", title: str = "") -> str:
    """One HTML page: loss, sharpness over threshold, distance, amplitude, by steps.

    It holds all that it needs and opens without a network. The panels, of what was
    recorded, share the axis of optimizer steps; a sweep has a slider for each dimension
    of its grid, and the same scales at every lane. Shaded from where the run diverged.

    **Arguments**

    - `data`: from `rodjax.dataset`, `rodjax.sweep` or `rodjax.training.forecast`; or
      `loss`, `status` and so on of checkpoints, as `plot_checkpoints` takes them.
    - `title`: of the page, and above the panels.

    **Returns** the text of the page, some 5 MB, to write to a file. **Raises**
    `ValueError` for data that is none of these, `ImportError` without plotly
    (`rodjax[view]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 3)
    >>> flow = rj.integrate(rj.flows.stable(sgd), jnp.ones(2), 3)
    >>> page = rj.view(rj.dataset(run, {"stable": flow}), "three steps")
    >>> "<title>three steps</title>" in page   # to write to a file, and to open
    True

    ```
    """
    try:
        from plotly.io import to_html
    except ImportError as error:
        raise ImportError("view needs plotly: pip install 'rodjax[view]'") from error
    if FLOW in data.dims and {"mean_loss", "diverged_at"} <= set(data):
        figure = _models(data)
    elif {"loss", "status"} <= set(data):
        figure = _checkpoints(data)
    else:
        raise ValueError(
            "data has neither mean_loss and diverged_at of a run and its flows nor "
            f"loss and status of checkpoints, but {', '.join(map(str, data))}: give "
            "what rodjax.dataset, rodjax.sweep or rodjax inspect made"
        )
    shown = html.escape(title)
    figure["layout"]["title"] = {"text": shown, "y": 0.98, "yanchor": "top"}
    body = to_html(
        figure,
        config=CONFIG,
        auto_play=False,
        full_html=False,
        div_id="view",
        post_script=SLIDE if "sliders" in figure["layout"] else None,
    )
    return PAGE.format(title=shown, body=body)


def _models(data: "xarray.Dataset") -> dict[str, Any]:
    """The figure of a run and its flows, with a frame for each lane of a grid."""
    dims = [str(dim) for dim in data.diverged_at.dims if dim != FLOW]
    panels = {key: panel for key, panel in PANELS.items() if key in data}
    data = _fewer(data.sortby(dims), dims, len(panels))
    names, steps = [str(name) for name in data[FLOW].values], data[STEP].values
    lanes = list(product(*(range(data.sizes[dim]) for dim in dims)))
    # [lanes, flows] and [lanes, flows, steps].
    ends = data.diverged_at.transpose(*dims, FLOW).values.reshape(len(lanes), -1)
    values = {
        key: _drawable(
            data[key].transpose(*dims, FLOW, STEP).values.reshape(*ends.shape, -1),
            panel,
        )
        for key, panel in panels.items()
    }
    # Nothing follows a run that is lost, nor does what a lost lane reaches set scales.
    gone = np.isfinite(ends)
    if RUN in names:
        gone |= gone[:, names.index(RUN), None]
    ranges = {key: _range(values[key], gone, panel) for key, panel in panels.items()}

    drawn = [
        (row, key, index)
        for row, key in enumerate(panels)
        for index, name in enumerate(names)
        # Of a run from itself there is no distance.
        if (key, name) != ("distance", RUN)
    ]
    lines = styles(names)
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": steps,
            "y": values[key][0, index],
            "yaxis": axis("y", row),
            "name": names[index],
            "legendgroup": names[index],
            "showlegend": row == 0,
            "line": lines[names[index]],
            "hovertemplate": "%{y:.3g}",
        }
        for row, key, index in drawn
    ]
    common = layout(panels, ranges, steps, len(dims))
    layouts = [lost(dict(zip(names, at, strict=True)), steps) for at in ends.tolist()]
    for one in layouts:
        one["shapes"] += common["shapes"]
    figure: dict[str, Any] = {"data": traces, "layout": common | layouts[0]}
    if dims:
        figure["layout"]["sliders"] = sliders(data, dims, common["height"])
        figure["frames"] = [
            {
                "name": ",".join(map(str, lane)),
                "data": [{"y": values[key][at, index]} for _, key, index in drawn],
                "traces": list(range(len(drawn))),
                "layout": layouts[at],
            }
            for at, lane in enumerate(lanes)
        ]
    return figure


def _checkpoints(data: "xarray.Dataset") -> dict[str, Any]:
    """The figure of checkpoints, coloured by their status."""
    panels = {key: panel for key, panel in CHECKPOINTS.items() if key in data}
    steps, codes = data[STEP].values, data["status"].values
    values = {key: _drawable(data[key].values, panel) for key, panel in panels.items()}
    none = np.zeros(1, bool)
    ranges = {k: _range(values[k][None], none, panel) for k, panel in panels.items()}
    names = list(data.attrs["status_names"])
    traces = []
    for row, key in enumerate(panels):
        common = {"type": "scatter", "yaxis": axis("y", row)}
        line = {"color": "gray", "width": 1}
        traces.append(
            common
            | {"mode": "lines", "x": steps, "y": values[key], "line": line}
            | {"showlegend": False, "hoverinfo": "skip"}
        )
        for code in np.unique(codes):
            there, name = codes == code, names[int(code)]
            marker = {"color": color(int(code)), "size": 6}
            traces.append(
                common
                | {"mode": "markers", "x": steps[there], "y": values[key][there]}
                | {"name": name, "legendgroup": name, "showlegend": row == 0}
                | {"marker": marker, "hovertemplate": "%{y:.3g}"}
            )
    return {"data": traces, "layout": layout(panels, ranges, steps, 0)}


def _fewer(data: "xarray.Dataset", dims: list[str], panels: int) -> "xarray.Dataset":
    """At fewer values of the longest dimensions of the grid, if it is too large."""
    lane = panels * data.sizes[FLOW] * data.sizes[STEP]
    while dims and lane * np.prod([data.sizes[dim] for dim in dims]) > MOST:
        dim = max(dims, key=lambda dim: data.sizes[dim])
        if data.sizes[dim] < 4:
            break
        data = data.isel({dim: evenly(data.sizes[dim], data.sizes[dim] // 2)})
    return data


def _drawable(values: NDArray[Any], panel: Panel) -> NDArray[Any]:
    """Gaps where an axis cannot show a value."""
    shown = np.isfinite(values) & ((values > 0) | (not panel.log))
    return np.where(shown, values, np.nan)


def _range(values: NDArray[Any], gone: NDArray[Any], panel: Panel) -> list[float]:
    """What an axis shows: all of the lanes and models that are not gone."""
    found = values[~gone]
    found = found[np.isfinite(found)]
    # The edge is always in sight.
    found = np.log10(found) if panel.log else np.append(found, 1.0)
    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 0.0)
    margin = 0.05 * (high - low) + 0.05
    return [low - margin, high + margin]
