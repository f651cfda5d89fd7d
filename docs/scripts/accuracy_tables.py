"""Tables of accuracy, from the committed results of the benchmarks."""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
#: Columns of the tables of accuracy: what the JSON says, and what readers do.
ACCURACY = {
    "limit": "limit",
    "rod": "rod",
    "bundle": "bundle of 3",
    "modulated": "modulated",
    "edge": "edge",
    "central": "central",
}
#: Of those of the degrees of the modulated flow.
DEGREES = {"limit": "limit", "modulated": "degree 2", "modulated-3": "degree 3"}


def rows(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    titles = list(titles)
    return "\n".join(
        "| " + " | ".join(line) + " |"
        for line in (titles, ["---"] * len(titles), *lines)
    )


def accuracy() -> str:
    """Nine optimizers on networks, relative to the stable flow: a table a file."""
    files = sorted(RESULTS.rglob("accuracy*.json"))
    return "\n\n".join(accuracy_of(json.loads(file.read_text())) for file in files)


def accuracy_of(found: dict[str, Any]) -> str:
    """Of one set of data, in one precision; medians over seeds."""
    models = [
        name for name in ACCURACY if any(has(row, name) for row in rows_of(found))
    ]
    pairs: dict[str, list[list[float]]] = {name: [] for name in models}
    lines, seeds = [], 1
    for name, row in found["rows"].items():
        network, _, optimizer = name.partition("-")
        first = measured(row)[0]
        shares = [one["share at threshold"] for one in measured(row)]
        line = [f"{network}, {optimizer}", f"{first['lr']:.3g}"]
        line.append(f"{statistics.median(shares):.0%}")
        for model in models:
            pair = relative(row, model) if has(row, model) else []
            pairs[model] += [pair] if pair else []
            line.append(pair_of(pair))
        lines.append(line)
        seeds = max(seeds, len(measured(row)))
    medians = [
        pair_of([statistics.median(side) for side in zip(*own, strict=True)])
        for own in pairs.values()
    ]
    lines.append(["**median**", "", "", *medians])
    titles = ["network, optimizer", "lr", "at the threshold"]
    titles += [ACCURACY[model] for model in models]
    samples = ", ".join(f"{n} for {name}" for name, n in found["n"].items())
    said = f"Data: {found['data']}, samples: {samples}; {found['dtype']}; "
    said += "one seed." if seeds == 1 else f"medians over {seeds} seeds."
    return f"{said}\n\n{rows(titles, lines)}"


def degrees() -> str:
    """The modulated flow by its degree: distances, and steps until one is passed."""
    files = sorted(RESULTS.rglob("degrees*.json"))
    return "\n\n".join(degrees_of(json.loads(file.read_text())) for file in files)


def degrees_of(found: dict[str, Any]) -> str:
    """Of one set of data, in one precision."""
    lines = []
    for name, row in found["rows"].items():
        network, _, optimizer = name.partition("-")
        pairs = [pair_of(relative(row, model)) for model in DEGREES]
        steps = [horizon(row, model) for model in DEGREES]
        lines.append([f"{network}, {optimizer}", *pairs, *steps])
    medians = [
        pair_of([statistics.median(side) for side in zip(*own, strict=True)])
        for own in ([relative(r, m) for r in rows_of(found)] for m in DEGREES)
    ]
    lines.append(["**median**", *medians, *[""] * len(DEGREES)])
    horizons = [f"horizon: {title}" for title in DEGREES.values()]
    titles = ["network, optimizer", *DEGREES.values(), *horizons]
    return f"{found['data']}, {found['dtype']}:\n\n{rows(titles, lines)}"


def horizon(row: dict[str, Any], model: str) -> str:
    """Steps until a distance passes 5 % of the stable flow's last: the median."""
    own = [found["horizon"] for x in measured(row) if (found := model_of(x, model))]
    steps = statistics.median([math.inf if x is None else x for x in own])
    return "whole window" if math.isinf(steps) else f"{steps:.0f}"


def over_limit() -> str:
    """The modulated flow's distance over the limit, in all files together."""
    lines = []
    for file in sorted(RESULTS.rglob("accuracy*.json")):
        found = json.loads(file.read_text())
        what, medians = f"{found['data']}, {found['dtype']}", []
        for name, row in found["rows"].items():
            own = row.get("over limit", {}).get("modulated")
            if own is None:
                continue
            network, _, optimizer = name.partition("-")
            parts = [own["final"], own["mean"]]
            medians.append([part["median"] for part in parts])
            line = [what, f"{network}, {optimizer}", *map(spread, parts)]
            lines.append([*line, str(len(measured(row)))])
        middle = (
            two_digits(statistics.median(side)) for side in zip(*medians, strict=True)
        )
        lines.append([what, "**median**", *middle, ""])
    return rows(
        ["data", "network, optimizer", "at the end", "on average", "seeds"], lines
    )


def spread(found: dict[str, float]) -> str:
    """The median over seeds, and from the least to the largest."""
    keys = ("median", "least", "largest")
    middle, least, most = (two_digits(found[key]) for key in keys)
    return middle if least == most else f"{middle} ({least} to {most})"


def two_digits(number: float) -> str:
    """Two significant digits, the whole number, or its power of ten."""
    if number > 9999:
        return f"{number:.0e}"
    return f"{number:.0f}" if number > 99 else f"{number:.2g}"


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were measured."""
    return list(found["rows"].values())


def measured(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured for a row: once for every seed whose run did not diverge."""
    seeds = list(row["seeds"].values()) if "seeds" in row else [row]
    return [one for one in seeds if one.get("diverged at") is None]


def model_of(one: dict[str, Any], model: str) -> dict[str, Any] | None:
    """A flow, or the run beside itself."""
    return one.get("limit") if model == "limit" else one["flows"].get(model)


def has(row: dict[str, Any], model: str) -> bool:
    """Whether a row has a model."""
    return any(model_of(one, model) for one in measured(row))


def relative(row: dict[str, Any], model: str) -> list[float]:
    """Distances over the stable flow's, at the end and on average: medians."""
    sides = []
    for key in ("final_distance", "mean_distance"):
        ratios = []
        for one in measured(row):
            own = model_of(one, model)
            if own is not None:
                lost = own["diverged_at"] is not None
                base = one["flows"]["stable"][key]
                ratios.append(math.inf if lost else own[key] / base)
        sides.append(statistics.median(ratios))
    return sides


def short(number: float) -> str:
    """Two significant digits, or three decimals."""
    if math.isinf(number):
        return "diverged"
    return f"{number:.2f}" if number > 0.0995 else f"{number:.3f}"


def pair_of(numbers: list[float]) -> str:
    """The end and the average, on one line."""
    return "&nbsp;/&nbsp;".join(map(short, numbers))
