"""How close each flow stays to its optimizer at the edge of stability.

Trains the digits MLP with nine optimizers, on the windows of the table below, and
prints the distance of the flows' centres from the run's midpoints, relative to the
stable flow's: at the end, and averaged over the window. On two rows the single rod and
the bundle of three are judged too, by their sharpness over threshold.

    python benchmarks/flow_accuracy.py                    # float64, one data seed
    python benchmarks/flow_accuracy.py --float32 --seeds 3 --out accuracy32.json
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import rodjax as rj
from rodjax.transforms import scalar_adam, scalar_nadam, scalar_rmsprop


class Row(NamedTuple):
    """One optimizer on one window: `start` steps, then `steps` compared."""

    optimizer: Callable[[Any], optax.GradientTransformation]
    lr: float
    start: int
    steps: int
    rods: bool = False
    problem: Mapping[str, Any] = {}


ROWS = {
    "GD": Row(optax.sgd, 0.6, 20, 420, rods=True),
    "GD, wider net": Row(
        optax.sgd, 0.4, 100, 900, problem={"widths": (32, 32), "n": 200}
    ),
    "RMSProp 0.999": Row(
        lambda lr: optax.rmsprop(lr, decay=0.999), 1e-3, 20, 240, rods=True
    ),
    "RMSProp 0.99": Row(lambda lr: optax.rmsprop(lr, decay=0.99), 1e-3, 20, 240),
    "scalar RMSProp": Row(lambda lr: scalar_rmsprop(lr, decay=0.999), 0.1, 20, 240),
    "heavy ball": Row(lambda lr: optax.sgd(lr, momentum=0.9), 1.2, 200, 400),
    "Nesterov": Row(
        lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True), 0.45, 100, 400
    ),
    "Adam": Row(lambda lr: optax.adam(lr, b2=0.99), 3e-2, 40, 260),
    "NAdam": Row(lambda lr: optax.nadam(lr, b2=0.99), 1e-2, 60, 300),
    "scalar Adam": Row(lambda lr: scalar_adam(lr, b2=0.99), 0.5, 60, 300),
    "scalar NAdam": Row(lambda lr: scalar_nadam(lr, b2=0.99), 0.2, 60, 300),
}


def measure(row: Row, seed: int, dtype: str) -> dict[str, float]:
    """All figures of one row. Seed k takes the k-th n samples and k-th weights."""
    n = row.problem.get("n", 100)
    problem = rj.problems.digits_mlp(
        **{"n": n, "seed": seed, "skip": n * seed, "dtype": dtype, **row.problem}
    )
    dynamics = rj.dynamics(row.optimizer, problem.loss)
    edge = (rj.edge_of_stability(dynamics),)
    window = rj.warm_up(dynamics, problem.params, row.start, lr=row.lr)
    run = rj.descend(dynamics, window, row.steps, lr=row.lr, metrics=edge)
    flows = {
        "stable": rj.flows.stable(dynamics),
        "modulated": rj.flows.modulated(dynamics),
    }
    if row.rods:
        flows["rod"] = rj.flows.rod(dynamics)
        flows["bundle"] = rj.flows.rod(dynamics, rank=3)
    found = {"max ratio of the run": float(run.metrics["sharpness_ratio"].max())}
    for name, flow in flows.items():
        metrics = edge if row.rods else ()
        path = rj.integrate(flow, window, row.steps, lr=row.lr, metrics=metrics)
        summary = rj.compare(path, run).summary()
        for key in ("final_distance", "mean_distance", "median_sharpness_ratio"):
            found[f"{name} {key}"] = summary[key]
    for name in flows:
        for part in ("final", "mean"):
            own, base = (f"{m} {part}_distance" for m in (name, "stable"))
            # A run that diverged leaves nothing to compare.
            alive = math.isnan(float(run.diverged_at)) and found[base] > 0
            found[f"{name} {part}"] = found[own] / found[base] if alive else math.nan
    # Compiled programs of all rows together exhaust the compiler's memory.
    jax.clear_caches()
    return found


def median(values: Iterable[float]) -> float:
    """The median of those that exist."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def ratios(found: Mapping[str, float], flow: str) -> str:
    """Final / mean distance of `flow`, relative to the stable flow's."""
    return f"{found[f'{flow} final']:.3f} / {found[f'{flow} mean']:.3f}"


def line(cells: Iterable[str]) -> str:
    """A line of the table, as a Markdown row."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS).replace(", ", " "))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--out", default="flow_accuracy.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", not options.float32)
    dtype = "float32" if options.float32 else "float64"
    wanted = options.rows.split(",")
    rows = {name: row for name, row in ROWS.items() if name.replace(",", "") in wanted}

    titles = ("run's highest ratio", "stable", "modulated", "each seed's")
    print(line(("optimizer, lr, window", *titles, "rod, bundle: median S/threshold")))
    print(line(["---"] * 6))
    results = {}
    for name, row in rows.items():
        found = [measure(row, seed, dtype) for seed in range(options.seeds)]
        results[name] = found
        middle = {key: median(f[key] for f in found) for key in found[0]}
        medians = [
            f"{middle[key]:.3f}"
            for model in ("rod", "bundle")
            if (key := f"{model} median_sharpness_ratio") in middle
        ]
        cells = [
            f"{name} {row.lr:g}, {row.start}+{row.steps}",
            f"{middle['max ratio of the run']:.2f}",
            f"{middle['stable final_distance']:.3f}",
            ratios(middle, "modulated"),
            ", ".join(ratios(f, "modulated") for f in found),
            ", ".join(medians),
        ]
        print(line(cells), flush=True)
        with open(options.out, "w") as file:
            json.dump({"dtype": dtype, "rows": results}, file, indent=2)


if __name__ == "__main__":
    main()
