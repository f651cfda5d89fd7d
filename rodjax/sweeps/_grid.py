"""The named grid of a sweep: axes, crossed or zipped, and its lanes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: The axis of whole numbers that draws initial parameters.
SEED = "seed"

Axes = Mapping[str | tuple[str, ...], ArrayLike | Sequence[ArrayLike]]


class Grid(NamedTuple):
    """Named values, crossed over the dimensions and zipped along each.

    - `dims`: the dimensions, in order: the names zipped along each. A dimension is
      called by the first of them.
    - `values`: name -> [length of its dimension], or [] for a fixed value.
    """

    dims: tuple[tuple[str, ...], ...]
    values: dict[str, NDArray[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of every dimension."""
        return tuple(len(self.values[names[0]]) for names in self.dims)

    @property
    def lanes(self) -> int:
        """The number of points, each a lane of the sweep."""
        return int(np.prod(self.shape, dtype=np.int64))

    def points(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Name -> [count]: the points from lane `first` on, the last dimension fastest.

        Beyond the end the last point is repeated, so that chunks are of one shape.
        """
        lanes = np.minimum(np.arange(first, first + count), self.lanes - 1)
        where = np.unravel_index(lanes, self.shape) if self.dims else ()
        index = {
            name: i for names, i in zip(self.dims, where, strict=True) for name in names
        }
        return {
            name: value[index[name]] if name in index else np.full(count, value)
            for name, value in self.values.items()
        }


def make_grid(axes: Axes) -> Grid:
    """Check the axes of a sweep and put them in order.

    **Arguments**

    - `axes`: name -> values. Every entry is a dimension of its own, crossed with the
      others; `("lr", "momentum"): (values, values)` zips names along one. A single
      number is fixed for all lanes, and no dimension.

    **Raises** `ValueError`, naming the axis: values that are not finite real numbers in
    one dimension, none at all, zipped ones of different lengths, a name used twice, a
    `seed` that is not a whole number of 0 to 2^31 - 1.
    """
    dims: list[tuple[str, ...]] = []
    values: dict[str, NDArray[Any]] = {}
    for key, given in axes.items():
        zipped = isinstance(key, tuple)
        names = key if zipped else (key,)
        columns: Any = given if zipped else (given,)
        if not names or len(columns) != len(names):
            raise ValueError(
                f"grid axis {key}: give one sequence of values for each of its names"
            )
        arrays = list(map(_values, names, columns))
        for name, array in zip(names, arrays, strict=True):
            if name in values:
                raise ValueError(f"grid axis {name!r} is given twice")
            values[name] = array
        lengths = [array.shape for array in arrays]
        if len(set(lengths)) > 1 or (zipped and lengths[0] == ()):
            raise ValueError(
                f"grid axes {', '.join(names)} are zipped: give them sequences of one "
                f"length, not of shapes {', '.join(map(str, lengths))}"
            )
        if lengths[0]:
            dims.append(tuple(names))
    return Grid(tuple(dims), values)


def _values(name: Any, given: Any) -> NDArray[Any]:
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"grid axis {name!r}: name it like a Python variable")
    if name in ("flow", "step"):
        raise ValueError(f"grid axis {name!r}: the result has a dimension of that name")
    array = np.asarray(given)
    if array.ndim > 1 or array.size == 0:
        raise ValueError(
            f"grid axis {name!r}: give a number or a sequence of numbers, not an array "
            f"of shape {array.shape}"
        )
    if array.dtype.kind not in "iuf" or not np.all(np.isfinite(array)):
        raise ValueError(
            f"grid axis {name!r}: values must be finite real numbers, got {given}"
        )
    if name == SEED:
        if array.dtype.kind == "f" or np.any((array < 0) | (array >= 2**31)):
            raise ValueError(
                f"grid axis 'seed': give whole numbers from 0 to 2**31 - 1, got {given}"
            )
        return array.astype(np.int32)
    return array.astype(np.float64)
