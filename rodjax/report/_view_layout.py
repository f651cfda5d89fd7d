"""Where the parts of a page for a browser stand, and how they look, for plotly."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rodjax.solve import RUN

if TYPE_CHECKING:
    import xarray

#: Pixels: of a panel, a slider, and what stands above and below.
PANEL, SLIDER, TOP, BOTTOM = 190, 85, 80, 60


class Panel(NamedTuple):
    """What an axis says, and if it is logarithmic, else linear with the edge at 1."""

    label: str
    log: bool = True


def lost(when: dict[str, float], steps: NDArray[Any]) -> dict[str, Any]:
    """What is said and shaded where models diverged, and hidden where none did."""
    run = when.get(RUN, np.nan)
    text = [f"{k} diverged at step {t:g}" for k, t in when.items() if np.isfinite(t)]
    shade = {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": max(run, steps[0]) if np.isfinite(run) else steps[0],
        "x1": steps[-1],
        "y0": 0,
        "y1": 1,
        "fillcolor": "black",
        "opacity": 0.15,
        "line": {"width": 0},
        "layer": "below",
        "visible": bool(np.isfinite(run)),
    }
    said = {
        "text": "<br>".join(text),
        "xref": "paper",
        "yref": "y domain",
        "x": 0.01,
        "y": 0.04,
        "xanchor": "left",
        "yanchor": "bottom",
        "align": "left",
        "showarrow": False,
        "font": {"size": 11},
        "visible": bool(text),
    }
    return {"shapes": [shade], "annotations": [said]}


def layout(
    panels: dict[str, Panel],
    ranges: dict[str, list[float]],
    steps: NDArray[Any],
    sliders: int,
) -> dict[str, Any]:
    """Panels below each other on one axis of steps, the first on top."""
    height, low = PANEL * len(panels), BOTTOM + SLIDER * sliders
    margin = 0.02 * (steps[-1] - steps[0]) or 1.0
    box = {"showline": True, "linecolor": "gray"}
    axes: dict[str, Any] = {}
    edges = []
    for row, (key, panel) in enumerate(panels.items()):
        top = 1 - row / len(panels)
        axes[axis("yaxis", row)] = box | {
            "domain": [top - 1 / len(panels) + 0.02 * (row < len(panels) - 1), top],
            "title": {"text": panel.label, "font": {"size": 12}},
            "type": "log" if panel.log else "linear",
            "range": ranges[key],
            "mirror": True,
            "ticks": "outside",
            "exponentformat": "power",
            "nticks": 4,
        }
        if not panel.log:
            line = {"color": "gray", "width": 1.5, "dash": "dot"}
            at = {"x0": 0, "x1": 1, "y0": 1, "y1": 1}
            place = {"type": "line", "xref": "paper", "yref": axis("y", row)}
            edges.append(place | at | {"line": line})
    return axes | {
        "xaxis": box
        | {
            "title": {"text": "optimizer steps"},
            "anchor": axis("y", len(panels) - 1),
            "range": [steps[0] - margin, steps[-1] + margin],
            "mirror": "all",
            "showspikes": True,
            "spikemode": "across",
            "spikethickness": 1,
            "spikedash": "solid",
            "spikecolor": "lightgray",
        },
        "shapes": edges,
        "template": "plotly_white",
        "height": TOP + height + low,
        "margin": {"t": TOP, "b": low, "l": 80, "r": 20},
        "legend": {
            "orientation": "h",
            "y": 1,
            "yanchor": "bottom",
            "x": 0,
            "bgcolor": "rgba(0, 0, 0, 0)",
        },
        "hovermode": "x",
        "hoversubplots": "axis",
    }


def sliders(
    data: "xarray.Dataset", dims: list[str], height: int
) -> list[dict[str, Any]]:
    """A slider for each dimension, which names what varies along it."""
    inner = height - TOP - BOTTOM - SLIDER * len(dims)
    return [
        {
            "active": 0,
            # What happens is the page's own affair: it depends on all sliders.
            "steps": [
                {"label": label, "method": "skip"} for label in _labels(data, dim)
            ],
            "currentvalue": {"prefix": f"{dim} ", "font": {"size": 14}},
            # Room for long labels at the ends.
            "x": 0.05,
            "len": 0.9,
            "y": -(BOTTOM + SLIDER * row) / inner,
            "yanchor": "top",
            "pad": {"t": 0, "b": 0},
        }
        for row, dim in enumerate(dims)
    ]


def _labels(data: "xarray.Dataset", dim: str) -> list[str]:
    """The values along a dimension, and of what varies together with it."""
    said = [_text(value) for value in data[dim].values.tolist()]
    for name, values in data.coords.items():
        if values.dims == (dim,) and name != dim:
            more = map(_text, values.values.tolist())
            said = [f"{a}, {name} {b}" for a, b in zip(said, more, strict=True)]
    return said


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """How each model is drawn, as in the other pictures."""
    flows = [name for name in names if name != RUN]
    colors = {n: {"color": color(i), "width": 1.5} for i, n in enumerate(flows)}
    found = {RUN: {"color": "rgba(0, 0, 0, 0.5)", "width": 2.5}} | colors
    # Else curves are drawn with corners.
    return {name: style | {"simplify": False} for name, style in found.items()}


def color(index: int) -> str:
    """Matplotlib's C0, C1 and so on."""
    from plotly.colors import qualitative

    return qualitative.D3[index % len(qualitative.D3)]


def axis(letter: str, row: int) -> str:
    """Plotly's name of a panel's axis: y, y2, y3."""
    return letter if row == 0 else f"{letter}{row + 1}"
