"""What pages take from elsewhere, so that it cannot drift: the registry of flows, and
the committed results of the benchmarks, where a page has `<!-- table: NAME -->`."""

import json
import re
from typing import Any

from accuracy_tables import RESULTS, accuracy, degrees, over_limit, rows, short

MARK = re.compile(r"^<!-- table: (\S+) -->$", re.M)
REFERENCE = {
    "final_distance": "final distance",
    "mean_distance": "mean distance",
    "final_sharpness_ratio": "final S/threshold",
    "median_sharpness_ratio": "median S/threshold",
    "times GD": "time / GD's own",
}


def on_files(files, *, config):
    """The picture of the front page, which the README shows too."""
    from mkdocs.structure.files import File

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
    if name in WHOLE:
        return WHOLE[name]()
    file, tabulated = TABLES[name]
    if not (RESULTS / file).exists():
        return "Not measured: no result is committed."
    return tabulated(read(file))


def read(name: str) -> dict[str, Any]:
    """A committed result in JSON."""
    return json.loads((RESULTS / name).read_text())


def flows() -> str:
    """All flows, with links to their pages."""
    from rodjax.flows import table as whole

    text = whole().replace("<", "&lt;")
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
    return text.replace("|", "\\|").replace("<", "&lt;")


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


def memory(found: dict[str, Any]) -> str:
    """Copies of the parameters by program, model and size: of compiled programs."""
    own = [f"{own['gradient_own']:.1f}" for _, own in sizes(found)]
    return copies(found, "copies", ["the gradient itself", *own])


def memory_process(found: dict[str, Any]) -> str:
    """The same of processes that run them, less one that runs the gradient."""
    return copies(found, "process")


def sizes(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was measured of each model at each size."""
    return [
        (f"{model}, {size}", found[model][size])
        for model in ("mlp", "transformer")
        for size in sorted(found.get(model, {}), key=float)
    ]


def copies(found: dict[str, Any], key: str, *first: list[str]) -> str:
    """A row for each program of which there is a figure, but the gradient's."""
    columns = [
        (title, {name: x[key] for name, x in own.items() if key in _parts(x)})
        for title, own in sizes(found)
    ]
    columns = [(title, own) for title, own in columns if own]
    names = dict.fromkeys(name for _, own in columns for name in own)
    lines = [
        [name, *(f"{own[name]:.1f}" if name in own else "-" for _, own in columns)]
        for name in names
        if name != "gradient"
    ]
    return rows(["", *(title for title, _ in columns)], [*first, *lines])


def _parts(figures: Any) -> dict[str, Any]:
    return figures if isinstance(figures, dict) else {}


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


def watching(found: dict[str, Any]) -> str:
    """What a watched step takes beyond a plain one, by model."""
    models = [name for name in found if name != "device"]
    ways = [way for way in found[models[0]]["ways"] if way != "not watched"]

    def cell(way: str, model: str) -> str:
        return f"{100 * found[model]['ways'][way]['over plain']:.0f} %"

    lines = [[way, *(cell(way, model) for model in models)] for way in ways]
    titles = ["", *(f"{m}, {found[m]['parameters']:,} parameters" for m in models)]
    return rows(titles, lines)


def convolutions(found: dict[str, Any]) -> str:
    """Milliseconds of a convolution's derivatives in a loop."""
    kinds = [name for name in found if name != "device"]
    titles = list(found[kinds[0]])
    lines = [[kind, *(f"{found[kind][t]:.0f}" for t in titles)] for kind in kinds]
    return rows(["ms", *titles], lines)


def sweep(found: dict[str, Any]) -> str:
    """A sweep beside loops over its lanes, on a CPU."""
    base = found["seconds"]["sweep"]
    lines = [
        [name, f"{own:.2f}", f"{own / base:.2f}", f"{found['compilation'][name]:.1f}"]
        for name, own in found["seconds"].items()
    ]
    titles = ["", "seconds", "over the sweep's", "compilation, s"]
    what = f"{found['lanes']} lanes, {found['devices']} CPU cores."
    return f"{what}\n\n{rows(titles, lines)}"


def startup(found: dict[str, Any]) -> str:
    """Seconds of a start of the command, by part."""
    titles = list(next(iter(found["starts"].values())))
    lines = [
        [case, *(f"{own[title]:.1f}" for title in titles)]
        for case, own in found["starts"].items()
    ]
    return f"{found['cores']} CPU cores.\n\n{rows(['seconds', *titles], lines)}"


def _device(found: dict[str, Any]) -> str:
    return f"{found['device']}, jax {found['jax']}."


#: Tables that know what they are made of.
WHOLE = {
    "flows": flows,
    "accuracy": accuracy,
    "accuracy-over-limit": over_limit,
    "degrees": degrees,
}
#: Name -> the file, and what makes a table of it.
TABLES = {
    "reference": ("reference.json", reference),
    "watching": ("watch.json", watching),
    "convolutions": ("convolutions.json", convolutions),
    "startup": ("startup.json", startup),
    "sweep": ("sweep.json", sweep),
    "memory": ("memory.json", memory),
    "memory-process": ("memory.json", memory_process),
    "accelerator-cost": ("h100.json", accelerator_cost),
    "accelerator-sweep": ("h100.json", accelerator_sweep),
    "accelerator-accuracy": ("h100.json", accelerator_accuracy),
}
