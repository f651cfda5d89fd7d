"""The grid of a sweep as the command line writes it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rodjax.sweeps import SEED

#: The axis that flows take, not the optimizer: the least size of their oscillation.
FLOOR = "floor"

Values = float | NDArray[Any]
RANGE = re.compile(r"([^:]+):([^:]+):(\d+)(log|lin|)")


def values(flag: str, text: str) -> Values:
    """Parse FROM:TO:COUNTlog, FROM:TO:COUNT, a list of numbers, or one number.

    **Raises** `ValueError`, naming `flag`, for anything else.
    """
    try:
        if (found := RANGE.fullmatch(text)) is None:
            numbers = [float(part) for part in text.split(",")]
            return numbers[0] if len(numbers) == 1 else np.array(numbers)
        first, last, count = float(found[1]), float(found[2]), int(found[3])
    except ValueError:
        raise ValueError(
            f"{flag} {text}: write FROM:TO:COUNTlog (such as 0.05:0.8:16log), "
            "FROM:TO:COUNT, numbers separated by commas, or one number"
        ) from None
    if count < 2:
        raise ValueError(f"{flag} {text}: COUNT must be at least 2")
    if found[4] != "log":
        return np.linspace(first, last, count)
    if not (first > 0 and last > 0):
        raise ValueError(f"{flag} {text}: FROM and TO of a log range must be positive")
    return np.geomspace(first, last, count)


def axis(text: str) -> tuple[str, Values]:
    """Parse NAME=VALUES."""
    name, equals, given = text.partition("=")
    if not (name.isidentifier() and equals and given):
        raise ValueError(f"--axis {text}: write NAME=VALUES, such as momentum=0:0.9:4")
    if name in ("lr", SEED):
        raise ValueError(f"--axis {text}: use --lr or --seeds")
    found = values(f"--axis {name}", given)
    if name == FLOOR and not np.all(np.asarray(found) >= 0):
        raise ValueError(f"--axis {text}: floors must be at least 0")
    return name, found


def grid(
    lr: str, axes: Sequence[str], seeds: int | None, zips: Sequence[str]
) -> dict[str | tuple[str, ...], Any]:
    """The grid for `rodjax.sweep`, from the options as they were given."""
    found: dict[str, Any] = {"lr": values("--lr", lr)}
    if not np.all((np.asarray(found["lr"]) > 0) & np.isfinite(found["lr"])):
        raise ValueError(f"--lr {lr}: learning rates must be positive and finite")
    for name, given in map(axis, axes):
        if name in found:
            raise ValueError(f"--axis {name} is given twice")
        found[name] = given
    if seeds is not None:
        if seeds < 1:
            raise ValueError(f"--seeds {seeds}: it must be at least 1")
        found[SEED] = np.arange(seeds)
    return _zipped(found, zips)


def _zipped(
    found: Mapping[str, Any], zips: Sequence[str]
) -> dict[str | tuple[str, ...], Any]:
    together: dict[str, tuple[str, ...]] = {}
    for text in zips:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in found or name in together or names.count(name) > 1:
                raise ValueError(
                    f"--zip {text}: name each axis once, of {', '.join(found)}"
                )
        if len(names) < 2:
            raise ValueError(f"--zip {text}: name at least two axes, such as lr,b2")
        together |= dict.fromkeys(names, names)
    axes: dict[str | tuple[str, ...], Any] = {}
    for name, given in found.items():
        names = together.get(name)
        if names is None:
            axes[name] = given
        else:
            axes[names] = [found[one] for one in names]
    return axes
