"""What pages take from elsewhere, so that it cannot drift: the registry of flows, and
the committed results of the benchmarks, where a page has `<!-- table: NAME -->`."""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"^<!-- table: (\S+) -->$", re.M)
#: Columns of the tables of accuracy: what the JSON says, and what readers do.
ACCURACY = {
    "rod": "rod",
    "bundle": "bundle of 3",
    "modulated": "modulated",
    "edge": "edge",
    "central": "central",
}
REFERENCE = {
    "final_distance": "final distance",
    "mean_distance": "mean distance",
    "final_sharpness_ratio": "final S/threshold",
    "median_sharpness_ratio": "median S/threshold",
    "times GD": "time / GD's own",
}


def on_files(files, *, config):
    """The picture of the front page, which the README shows too."""
    content = (RESULTS / "rodjax-run.png").read_bytes()
    files.append(File.generated(config, "figures/rodjax-run.png", content=content))
    return files


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Puts the tables in; an unknown name ends the build."""
    return MARK.sub(lambda match: table(match[1]), markdown)


def table(name: str) -> str:
    """The table that a page asks for."""
    if name.startswith("flow:"):
        return flow(name.partition(":")[2])
    if name == "flows":
        return flows()
    file, tabulated = TABLES[name]
    if not (RESULTS / file).exists():
        return "Not measured: no result is committed."
    return tabulated(read(file))


def read(name: str) -> dict[str, Any]:
    """A committed result in JSON."""
    return json.loads((RESULTS / name).read_text())


def rows(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    titles = list(titles)
    return "\n".join(
        "| " + " | ".join(line) + " |"
        for line in (titles, ["---"] * len(titles), *lines)
    )


def flows() -> str:
    """All flows, with links to their pages."""
    from rodjax.flows import table as whole

    text = whole()
    return re.sub(r"^\| `(\w+)`", r"| [`\1`](\1.md)", text, flags=re.M)


def flow(name: str) -> str:
    """What the registry says of one flow."""
    from rodjax.flows import REGISTRY

    record = REGISTRY[name]
    lines = {
        "models": record.models,
        "optimizers": record.optimizers,
        "state": record.state,
        "cost of a call": record.cost,
        "misses": record.misses,
        "source": record.source,
    }
    titles = ["function", f"[`rj.flows.{name}`][rodjax.flows.{name}]"]
    return rows(titles, ([f"**{a}**", _cell(b)] for a, b in lines.items()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def short(number: float) -> str:
    """Two significant digits, or three decimals."""
    return f"{number:.2f}" if number >= 0.1 else f"{number:.3f}"


def pair_of(numbers: Iterable[float]) -> str:
    """The end and the average, on one line."""
    return "&nbsp;/&nbsp;".join(map(short, numbers))


def accuracy(found: dict[str, Any]) -> str:
    """Nine optimizers on three networks, relative to the stable flow."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ACCURACY}
    lines = []
    for name, row in found["rows"].items():
        network, _, optimizer = name.partition("-")
        line = [f"{network}, {optimizer}", f"{row['lr']:g}"]
        line.append(f"{row['share at threshold']:.0%}")
        base = row["flows"]["stable"]
        for column in ACCURACY:
            own = row["flows"].get(column)
            if own is None:
                line.append("")
                continue
            pair = tuple(
                own[key] / base[key] for key in ("final_distance", "mean_distance")
            )
            pairs[column].append(pair)
            line.append(pair_of(pair))
        lines.append(line)
    medians = [
        pair_of(map(statistics.median, zip(*own, strict=True)))
        for own in pairs.values()
    ]
    lines.append(["**median**", "", "", *medians])
    titles = ["network, optimizer", "lr", "at the threshold", *ACCURACY.values()]
    samples = ", ".join(f"{n} for {name}" for name, n in found["n"].items())
    said = f"Data: {found['data']}, samples: {samples}; {found['dtype']}."
    return f"{said}\n\n{rows(titles, lines)}"


def reference(found: dict[str, Any]) -> str:
    """Every flow on the reference problem."""
    lines = [
        [name, *(f"{own[key]:.3g}" for key in REFERENCE)]
        for name, own in found["flows"].items()
    ]
    return rows(["flow", *REFERENCE.values()], lines)


def accelerator_cost(found: dict[str, Any]) -> str:
    """Milliseconds a step by size, on an accelerator."""
    lines = [
        [size, name, f"{own['ms a step']:.3g}", f"{own['times Optax']:.3g}"]
        for size, models in found["cost"].items()
        for name, own in models.items()
    ]
    titles = ["parameters", "", "ms a step", "times Optax's own"]
    return f"{_device(found)}\n\n{rows(titles, lines)}"


def accelerator_sweep(found: dict[str, Any]) -> str:
    """A sweep beside a loop over its lanes, on an accelerator."""
    lines = [
        [
            lanes,
            f"{own['sweep seconds']:.3g}",
            f"{own['loop seconds']:.3g}",
            f"{own['loop / sweep']:.0f}",
            f"{own['compilation']:.3g}",
        ]
        for lanes, own in found["sweep"].items()
    ]
    titles = ["lanes", "sweep, s", "loop, s", "loop / sweep", "compilation, s"]
    return f"{_device(found)}\n\n{rows(titles, lines)}"


def accelerator_accuracy(found: dict[str, Any]) -> str:
    """The modulated flow over the stable one, on an accelerator."""
    lines = [
        [name.replace("-", ", ", 1), short(own["final"]), short(own["mean"])]
        for name, own in found["accuracy"].items()
    ]
    return f"{_device(found)}\n\n{rows(['row', 'final', 'mean'], lines)}"


def _device(found: dict[str, Any]) -> str:
    return f"{found['device']}, jax {found['jax']}."


#: Name -> the file, and what makes a table of it.
TABLES = {
    "accuracy": ("accuracy.json", accuracy),
    "reference": ("reference.json", reference),
    "accelerator-cost": ("h100.json", accelerator_cost),
    "accelerator-sweep": ("h100.json", accelerator_sweep),
    "accelerator-accuracy": ("h100.json", accelerator_accuracy),
}
