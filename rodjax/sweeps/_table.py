"""The labelled result of a sweep, put together from its chunks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from numpy.typing import NDArray

from rodjax.solve import (
    COMPARED,
    FLOW,
    RUN,
    STEP,
    SUMMARIES,
    attributes,
    stacked,
    step_coordinate,
)
from rodjax.sweeps._grid import Grid
from rodjax.sweeps._lanes import KEPT, Rows, Spec, recorded

if TYPE_CHECKING:
    import xarray

#: What stands for the grid's dimensions before they are told apart.
LANE = "lane"

#: Name -> dimensions and values; the first two dimensions are the flow and the lane.
Block = dict[str, tuple[tuple[str, ...], NDArray[Any]]]


def block(
    chunks: Sequence[Rows], counts: Sequence[int], models: Sequence[str]
) -> Block:
    """What a chunk of lanes comes to, from its chunks of time, for `models` in order.

    `counts` are the moments of each after its row 0, which only the first has filled.
    """

    def joined(*parts):
        spans = [slice(min(i, 1), n + 1) for i, n in enumerate(counts)]
        pairs = zip(parts, spans, strict=True)
        return np.concatenate([part[:, span] for part, span in pairs], axis=1)

    metrics = jax.tree.map(joined, *(rows.metrics for rows in chunks))
    kept = jax.tree.map(joined, *(rows.kept for rows in chunks))
    finite = np.isfinite(metrics[RUN]["loss"])
    metrics[RUN]["distance"] = np.where(finite, 0.0, np.nan)
    found: Block = {
        name: ((FLOW, LANE, STEP), values)
        for name, values in stacked([metrics[model] for model in models]).items()
    }
    for name, summary in SUMMARIES.items():
        if summary.source in found:
            values = found[summary.source][1]
            reduced = np.apply_along_axis(summary.reduce, -1, values)
            found[name] = ((FLOW, LANE), reduced)
    for name in ("evaluations", "diverged_at"):
        last = getattr(chunks[-1], name)
        values = np.stack([last[model] for model in models])
        # Missing where it never diverged.
        found[name] = ((FLOW, LANE), np.where(np.isinf(values), np.nan, values))
    for path, _ in jax.tree_util.tree_leaves_with_path(kept[RUN]):
        leaf = jax.tree_util.keystr(path, simple=True, separator=".")
        name = f"{KEPT}.{leaf}" if leaf else KEPT
        values = np.stack([_at(kept[model], path) for model in models])
        own = tuple(f"{name}_{i}" for i in range(values.ndim - 3))
        found[name] = ((FLOW, LANE, STEP, *own), values)
    return found


def long_names(spec: Spec) -> dict[str, str]:
    """Name -> long name of all that a sweep's result may hold."""
    named = dict(COMPARED)
    for _, flow in spec.flows:
        named |= flow.reports
    for metric in recorded(spec):
        named |= metric.long_names
    return named


def header(
    grid: Grid, models: Sequence[str], steps: NDArray[Any], settings: dict[str, Any]
) -> "xarray.Dataset":
    """The coordinates and attributes of the result, without its variables."""
    import xarray

    coordinates: dict[str, Any] = {FLOW: [*models], STEP: step_coordinate(steps)}
    dimension = {name: names[0] for names in grid.dims for name in names}
    for name, values in grid.values.items():
        dims = (dimension[name],) if name in dimension else ()
        coordinates[name] = (dims, values)
    return xarray.Dataset(coords=coordinates, attrs=settings)


def in_memory(
    blocks: Iterable[Block],
    grid: Grid,
    empty: "xarray.Dataset",
    long_names: Mapping[str, str],
) -> "xarray.Dataset":
    """The result as a data set."""
    columns: dict[str, list[NDArray[Any]]] = {}
    dims: dict[str, tuple[str, ...]] = {}
    for part in blocks:
        for name, (dims[name], values) in part.items():
            columns.setdefault(name, []).append(values)
    variables = {}
    for name, values in columns.items():
        lanes = np.concatenate(values, axis=1)[:, : grid.lanes]
        shape = (len(lanes), *grid.shape, *lanes.shape[2:])
        variables[name] = (
            _named(dims[name], grid),
            lanes.reshape(shape),
            attributes(name, long_names),
        )
    return empty.assign(variables)


def on_disk(
    blocks: Iterable[Block],
    grid: Grid,
    empty: "xarray.Dataset",
    long_names: Mapping[str, str],
    file: Path,
) -> None:
    """The result as a netCDF file, of which only one block at a time is in memory."""
    import h5netcdf

    # A file cut off in mid-write must not take the place of a whole one.
    part = file.with_name(f"{file.name}.part")
    empty.to_netcdf(part, engine="h5netcdf")
    with h5netcdf.File(part, "a") as target:
        first = 0
        for found in blocks:
            for name, (dims, values) in found.items():
                if name not in target.variables:
                    _create(target, name, _named(dims, grid), values)
                    target[name].attrs.update(attributes(name, long_names))
                _write(target[name], values, grid, first)
            first += found["diverged_at"][1].shape[1]
    part.replace(file)


def read(file: Path) -> "xarray.Dataset":
    """The result in a file, whose values are read as they are needed."""
    import xarray

    return xarray.open_dataset(file, engine="h5netcdf")


def _create(
    target: Any, name: str, dims: tuple[str, ...], values: NDArray[Any]
) -> None:
    for dim, size in zip(dims[::-1], values.shape[:1:-1], strict=False):
        if dim not in target.dimensions:
            target.dimensions[dim] = size
    target.create_variable(name, dims, values.dtype)


def _write(variable: Any, values: NDArray[Any], grid: Grid, first: int) -> None:
    for lane in range(min(values.shape[1], grid.lanes - first)):
        where = np.unravel_index(first + lane, grid.shape) if grid.dims else ()
        variable[(slice(None), *map(int, where))] = values[:, lane]


def _named(dims: tuple[str, ...], grid: Grid) -> tuple[str, ...]:
    """The dimensions with the grid's in place of the lane's."""
    return (dims[0], *(names[0] for names in grid.dims), *dims[2:])


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]
