"""What a sweep comes to: a summary as JSON, and a table."""

from typing import TYPE_CHECKING, Any

import numpy as np

from rodjax.cli._shared import cell, number
from rodjax.report import abscissa, alive, by_row, evenly, spread
from rodjax.solve import FLOW, NUDGED, RUN

if TYPE_CHECKING:
    import xarray

MEDIANS = ("final_distance", "mean_distance", "median_sharpness_ratio")
#: How much closer to the run than the stable flow a flow counts as following it.
CLOSER = 0.1
#: Rows of the table at most.
ROWS = 32


def summarize(data: "xarray.Dataset", head: dict[str, Any]) -> dict[str, Any]:
    """`head`, the grid, and per model what became of its lanes.

    Medians are over the lanes in which neither the run nor the flow diverged.
    """
    lost = data.diverged_at.notnull()
    grid = [name for name in data.coords if name not in (FLOW, "step")]
    names = [str(name) for name in data[FLOW].values]
    models = {
        name: {"diverged": int(lost.sel(flow=name).sum())}
        | {key: _median(data, key, name) for key in MEDIANS}
        for name in names
    }
    run = {key: models[RUN][key] for key in ("diverged", "median_sharpness_ratio")}
    limit = {NUDGED: models.pop(NUDGED)} if NUDGED in models else {}
    return (
        head
        | {
            "grid": {str(name): data[name].values.tolist() for name in grid},
            "dimensions": {str(d): n for d, n in lost.sizes.items() if d != FLOW},
            "lanes": lost.sel(flow=RUN).size,
            "run": run,
            "flows": {
                name: models[name] | {"largest_lr_followed": _followed(data, name)}
                for name in models
                if name != RUN
            },
        }
        | limit
    )


def table(data: "xarray.Dataset") -> list[str]:
    """The lines of a table: a row for each learning rate, a few columns for a model."""
    data, along, dim = abscissa(data, "lr")
    flows = [str(name) for name in data[FLOW].values if name != RUN]
    x, lost = data[along].values, data.diverged_at.notnull()
    lanes = lost.sel(flow=RUN).size // len(x)
    columns: dict[tuple[str, str], list[str]] = {
        ("", along): [cell(float(value)) for value in x],
        ("run", "diverged"): [
            f"{n} of {lanes}" for n in by_row(lost.sel(flow=RUN), dim).sum(1)
        ],
        ("run", "S/threshold"): _cells(data, "median_sharpness_ratio", RUN, dim),
    }
    for name in flows:
        columns[name, "distance"] = _cells(data, "final_distance", name, dim)
        if name != NUDGED:
            ratio = _cells(data, "median_sharpness_ratio", name, dim)
            columns[name, "S/threshold"] = ratio
    picked = evenly(len(x), ROWS)
    # A model is named above the first of its columns.
    above = [name if key != "S/threshold" else "" for name, key in columns]
    lines = [above, [key for _, key in columns]]
    lines += [[column[i] for column in columns.values()] for i in picked]
    text = ["".join(f"{part:>13}" for part in line) for line in lines]
    if len(picked) < len(x):
        text.append(f"{len(picked)} of {len(x)} values of {along} shown")
    return text


def _cells(data: "xarray.Dataset", key: str, name: str, dim: str) -> list[str]:
    middle = spread(alive(data, key, name), dim)[1]
    lost = data.diverged_at.notnull()
    alone = by_row(lost.sel(flow=name) & ~lost.sel(flow=RUN), dim)
    return [
        "diverged" if any(gone) and np.isnan(value) else cell(number(value))
        for value, gone in zip(middle, alone, strict=True)
    ]


def _median(data: "xarray.Dataset", key: str, name: str) -> float | None:
    values = alive(data, key, name).values
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _followed(data: "xarray.Dataset", name: str) -> float | None:
    """The largest lr at which the flow is much closer to the run than the stable flow.

    The flows' median final distances are compared; `None` if there is none.
    """
    if "stable" not in data[FLOW] or name == "stable" or "lr" not in data.coords:
        return None
    data, along, dim = abscissa(data, "lr")
    own, stable = (
        spread(alive(data, "final_distance", model), dim)[1]
        for model in (name, "stable")
    )
    close = data[along].values[own < CLOSER * stable]
    return float(close.max()) if along == "lr" and close.size else None
