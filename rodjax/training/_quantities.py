"""What can be watched, by name: what each needs, what it keeps, how it is read."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

#: Batches that the means are over.
BATCHES = 32
#: Of the exponential averages behind `oscillation`, in steps: 1 / (1 - MEMORY).
MEMORY = 0.95

# The number under the name itself, others under the name with an ending.
Entries = dict[str, Any]


class Quantity(NamedTuple):
    """One of what can be watched.

    - `about`: in words.
    - `needs`: the extra arguments of which one at least must be given.
    - `rhythm`: "step", every one, or "probe", every n-th.
    - `size`: how many numbers the state keeps for it.
    - `read`: these numbers [..., size], and a module of arrays -> entries of a report.
    """

    about: str
    needs: tuple[str, ...]
    rhythm: str
    size: int
    read: Callable[[Any, Any], Entries]


def _one(x: Any, xp: Any) -> Entries:
    """Of [there, number, ...]: what is kept is finite, so that NaN means a fault."""
    return {"": xp.where(x[..., 0] > 0, x[..., 1], xp.nan)}


def _pair(x: Any, xp: Any) -> Entries:
    residual = xp.where(x[..., 0] > 0, x[..., 2], xp.nan)
    return {**_one(x, xp), "_residual": residual}


def _mean(x: Any, xp: Any) -> Entries:
    """Of [count, ring]: the mean, its standard error, the number of batches."""
    count = xp.minimum(x[..., 0], BATCHES)
    # In front, until the ring is full.
    there = xp.arange(BATCHES) < count[..., None]
    ring, many = xp.where(there, x[..., 1:], 0), xp.maximum(count, 1)
    mean = ring.sum(-1) / many
    off = xp.where(there, ring - mean[..., None], 0)
    error = xp.sqrt((off**2).sum(-1) / xp.maximum(count - 1, 1) / many)
    return {
        "": xp.where(count > 0, mean, xp.nan),
        "_error": xp.where(count > 1, error, xp.nan),
        "_batches": count,
    }


def _oscillation(x: Any, xp: Any) -> Entries:
    """Of [weight, mean of (-1)^t a, mean of a^2, mean of |s|^2, mean of weight^2]."""
    weight, mean, square, norm, spread = (x[..., i] for i in range(5))
    there = (weight > 0) & (norm > 0)
    weight, size = xp.where(there, weight, 1), xp.sqrt(xp.where(there, norm, 1))
    # The averages are of weights that sum to `weight`, and whose squares to `spread`.
    scale = xp.sqrt(weight) * size
    floor = xp.sqrt(square * spread / weight) / scale
    found = xp.abs(mean) / scale
    return {
        "": xp.where(there, found, xp.nan),
        "_floor": xp.where(there, floor, xp.nan),
    }


#: Name -> what can be watched.
QUANTITIES: Mapping[str, Quantity] = MappingProxyType(
    {
        "update_ratio": Quantity(
            "size of a step over the parameters'", (), "step", 2, _one
        ),
        "realized_edge": Quantity(
            "realized edge: 1 where the step gains nothing",
            ("value_fn",),
            "probe",
            5,
            _one,
        ),
        "oscillation": Quantity(
            "alternation along the tracked top direction", (), "step", 5, _oscillation
        ),
        "alternation": Quantity("alternation of whole updates", (), "step", 2, _one),
        "step_curvature": Quantity(
            "curvature along the step: 2 at the edge", ("value_fn",), "probe", 2, _one
        ),
        "sharpness_ratio": Quantity(
            "preconditioned sharpness over its threshold",
            ("probe_fn", "value_fn"),
            "probe",
            3,
            _pair,
        ),
        "sharpness": Quantity(
            "largest eigenvalue of the Hessian",
            ("probe_fn", "value_fn"),
            "probe",
            3,
            _pair,
        ),
        "batch_sharpness": Quantity(
            "batch sharpness", ("value_fn",), "probe", 1 + BATCHES, _mean
        ),
        "noise_interaction": Quantity(
            "gradient-noise interaction", ("probe_fn",), "probe", 1 + BATCHES, _mean
        ),
        "block_sharpness": Quantity(
            "largest eigenvalue of a group's block of the Hessian",
            ("probe_fn", "value_fn"),
            "probe",
            3,
            _pair,
        ),
        "share": Quantity("a group's share of the top direction", (), "probe", 2, _one),
    }
)
#: What is watched if nothing is asked for by name.
DEFAULT = (
    "update_ratio",
    "realized_edge",
    "oscillation",
    "step_curvature",
    "sharpness_ratio",
)
#: Those of groups of parameters, which come with the groups.
GROUPED = ("block_sharpness", "share")
#: Those that keep a direction, the one that is watched for oscillation first.
TRACKED = ("sharpness_ratio", "sharpness")


def checked(quantities: Any) -> tuple[str, ...]:
    """The names, each of them known; those by default for `None`.

    **Raises** `ValueError` for unknown names, with those that are known.
    """
    if quantities is None:
        return DEFAULT
    names = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    choice = [name for name in QUANTITIES if name not in GROUPED]
    for name in names:
        if name not in choice:
            hint = "; give by= for those of groups" if name in GROUPED else ""
            raise ValueError(
                f"quantities has {name!r}, which is not one of {', '.join(choice)}"
                f"{hint}"
            )
    if "oscillation" in names and not set(TRACKED) & set(names):
        raise ValueError(
            "oscillation needs a direction that is tracked: add sharpness_ratio or "
            "sharpness to quantities"
        )
    return tuple(name for name in QUANTITIES if name in names)
