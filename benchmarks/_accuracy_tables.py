"""What rows of `accuracy.py` come to: medians and ranges over seeds, and tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from _common import head, row
from _rows import LIMIT, SHARE

#: Of a distance: at the end of a window, and averaged over it.
FINAL, MEAN = "final", "mean"
PARTS = {FINAL: "final_distance", MEAN: "mean_distance"}
STABLE = "stable"


def figures(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A row's figures over its seeds, each the median, the least and the largest.

    `relative` are distances over the stable flow's, the limit's among them, and
    `over limit` those of the flows over the limit's; infinite where one diverged. Seeds
    on which the run itself diverges do not count.
    """
    measured = {seed: one for seed, one in measured.items() if followed(one)}
    if not measured:
        return {"relative": {}, "over limit": {}}
    found: dict[str, Any] = {
        "share at threshold": spread(
            one["share at threshold"] for one in measured.values()
        ),
        "relative": {},
        "over limit": {},
    }
    flows = dict.fromkeys(name for one in measured.values() for name in one["flows"])
    for base, key in ((STABLE, "relative"), (LIMIT, "over limit")):
        for name in (*flows, LIMIT):
            if name == base:
                continue
            pairs = [
                ratio(distances(one, name), distances(one, base))
                for one in measured.values()
                if name in (*one["flows"], LIMIT)
            ]
            found[key][name] = {
                part: spread(pair[i] for pair in pairs) for i, part in enumerate(PARTS)
            }
    found["over limit"].pop(STABLE, None)
    return found


def followed(found: Mapping[str, Any]) -> bool:
    """Whether there was a run to follow: one that did not diverge."""
    return found["diverged at"] is None or not math.isfinite(found["diverged at"])


def distances(found: Mapping[str, Any], model: str) -> tuple[float, float]:
    """Final and mean distance of a flow or of the limit, infinite if it diverged."""
    own = found[LIMIT] if model == LIMIT else found["flows"][model]
    if own["diverged_at"] is not None:
        return math.inf, math.inf
    return own["final_distance"], own["mean_distance"]


def ratio(own: tuple[float, float], base: tuple[float, float]) -> list[float]:
    """Of each part; a distance of zero is as close as can be."""
    return [
        1.0 if a == b else a / b if b else math.inf
        for a, b in zip(own, base, strict=True)
    ]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and largest."""
    found = list(values)
    return {
        "median": float(np.median(found)),
        "least": float(np.min(found)),
        "largest": float(np.max(found)),
    }


def titles(flows: Sequence[str]) -> list[str]:
    """Of the first table."""
    others = [f"{flow}: final / mean / S" for flow in flows if flow != STABLE]
    return [
        "row, lr, window, seeds",
        "at threshold",
        "stable: final, S/threshold",
        "limit: final / mean",
        *others,
    ]


def line(name: str, found: Mapping[str, Any], flows: Sequence[str]) -> list[str]:
    """One row of the first table."""
    first = next(iter(found["seeds"].values()))
    seeds = {seed: one for seed, one in found["seeds"].items() if followed(one)}
    if not seeds:
        return [f"{name} {first['lr']:.3g}", "diverged"]

    def median(flow: str, key: str, digits: str = ".2f") -> str:
        own = [
            one["flows"][flow][key] for one in seeds.values() if flow in one["flows"]
        ]
        known = [value for value in own if value is not None]
        return format(np.median(known), digits) if known else "-"

    cells = [
        f"{pair(found['relative'][flow])} / {median(flow, 'median_sharpness_ratio')}"
        if flow in found["relative"]
        else ""
        for flow in flows
        if flow != STABLE
    ]
    stable = median(STABLE, "final_distance", ".3g")
    return [
        f"{name} {first['lr']:.3g}, {first['warmup']}+{first['steps']}, {len(seeds)}",
        f"{found['share at threshold']['median']:.2f}",
        f"{stable} / {median(STABLE, 'median_sharpness_ratio')}",
        pair(found["relative"][LIMIT]),
        *cells,
    ]


def medians(own: Mapping[str, Mapping[str, float | None]]) -> list[float]:
    """Of the final and the mean distance; infinite, which JSON has not, if diverged."""
    found = [own[part]["median"] for part in PARTS]
    return [math.inf if value is None else value for value in found]


def pair(own: Mapping[str, Mapping[str, float | None]], digits: str = ".3f") -> str:
    """Medians of the final and the mean distance, as text."""
    return " / ".join(format(value, digits) for value in medians(own))


def over_limit(
    saved: Mapping[str, Mapping[str, Any]], rows: Sequence[str], flows: Sequence[str]
) -> str:
    """The second table: distances over the limit."""
    others = [flow for flow in flows if flow != STABLE]
    lines = [
        [
            name,
            *(
                pair(saved[name]["over limit"][flow], ".2g")
                if flow in saved[name]["over limit"]
                else ""
                for flow in others
            ),
        ]
        for name in rows
    ]
    return "\n".join([head(["row", *others]), *map(row, lines)])


def horizons(
    saved: Mapping[str, Mapping[str, Any]], rows: Sequence[str], flows: Sequence[str]
) -> str:
    """The third table: steps until a distance passes a share of the stable flow's."""

    def median(name: str, model: str) -> str:
        found = saved[name]["seeds"].values()
        own = [
            one[LIMIT] if model == LIMIT else one["flows"].get(model, {})
            for one in found
            if followed(one)
        ]
        known = [one["horizon"] for one in own if "horizon" in one]
        steps = np.median([math.inf if x is None else x for x in known or [math.nan]])
        return f"{steps:.0f}" if math.isfinite(steps) else "all" if known else ""

    models = [LIMIT, *(flow for flow in flows if flow != STABLE)]
    lines = [[name, *(median(name, model) for model in models)] for name in rows]
    return "\n".join([head(["row", *models]), *map(row, lines)])


def conclude(rows: Mapping[str, Mapping[str, Any]], flows: Sequence[str]) -> None:
    """Medians over the rows, the worst one, and the rows that do not count."""
    print(f"\nMedian and worst of {len(rows)} rows, final / mean:")
    for key, base in (("relative", STABLE), ("over limit", LIMIT)):
        for flow in (LIMIT, *flows):
            own = [medians(one[key][flow]) for one in rows.values() if flow in one[key]]
            if own:
                middle, worst = np.median(own, axis=0), np.max(own, axis=0)
                numbers = "median {:.3f} / {:.3f}, worst {:.3f} / {:.3f}"
                said = numbers.format(*middle, *worst)
                print(f"  {flow} over {base}: {said}")
    for name, one in rows.items():
        for seed, found in one["seeds"].items():
            if not followed(found):
                print(f"{name}, seed {seed}: the run diverged, which does not count")
            elif found["share at threshold"] < SHARE:
                share = found["share at threshold"]
                print(f"{name}, seed {seed}: only {share:.0%} at the threshold")
