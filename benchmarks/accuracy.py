"""How close each flow stays to its optimizer at the edge of stability.

Nine optimizers on three networks (MLP, CNN, vision transformer), each on a window of
steps of which it spends at least half at its stability threshold: the run, then every
flow that serves the optimizer, from the run's own start. Of each flow the table has the
distance of its centre from the run's midpoints, at the end and averaged over the
window, relative to the stable flow's, and the median of its sharpness over threshold in
the last third.

    python benchmarks/accuracy.py                          # on digits
    python benchmarks/accuracy.py --rows mlp-gd,cnn-adam
    python benchmarks/accuracy.py --cifar10 PATH --n 1000 --out accuracy-cifar10

It writes a picture and a NetCDF file for each row, and `accuracy.json`, from which the
same command goes on after it was stopped.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _common import arguments, head, row, words, write

import rodjax as rj
from rodjax import problems, transforms

NETWORKS: Mapping[str, Callable[..., problems.Problem]] = {
    "mlp": problems.mlp,
    "cnn": problems.cnn,
    "vit": problems.vit,
}
OPTIMIZERS: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "heavy-ball": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "rmsprop": partial(optax.rmsprop, decay=0.99),
    "scalar-rmsprop": partial(transforms.scalar_rmsprop, decay=0.99),
    "adam": partial(optax.adam, b2=0.99),
    "scalar-adam": partial(transforms.scalar_adam, b2=0.99),
    "nadam": partial(optax.nadam, b2=0.99),
    "scalar-nadam": partial(transforms.scalar_nadam, b2=0.99),
}


class Window(NamedTuple):
    """`warmup` steps, then `steps` compared; no `lr` is one to be found by `choose`."""

    lr: float | None = None
    warmup: int = 20
    steps: int = 400


# Those on digits, in float32.
WINDOWS: Mapping[str, Window] = {
    "mlp-gd": Window(0.6, steps=600),
    "mlp-heavy-ball": Window(1.0, 100, 600),
    "mlp-nesterov": Window(0.5, 100, 600),
    "mlp-rmsprop": Window(8e-4, steps=600),
    "mlp-scalar-rmsprop": Window(0.035, steps=600),
    "mlp-adam": Window(0.025, steps=600),
    "mlp-scalar-adam": Window(0.1, 1500),
    "mlp-nadam": Window(6e-3, steps=600),
    "mlp-scalar-nadam": Window(0.45, steps=600),
    "cnn-gd": Window(0.38),
    "cnn-heavy-ball": Window(0.2, 500, 600),
    "cnn-nesterov": Window(0.085, 120, 600),
    "cnn-rmsprop": Window(3e-4),
    "cnn-scalar-rmsprop": Window(0.03),
    "cnn-adam": Window(0.03),
    "cnn-scalar-adam": Window(0.03, 1300),
    "cnn-nadam": Window(2e-3),
    "cnn-scalar-nadam": Window(0.55),
    "vit-gd": Window(0.08),
    "vit-heavy-ball": Window(0.14, 250, 600),
    "vit-nesterov": Window(0.065, 600),
    "vit-rmsprop": Window(3e-4, 60),
    "vit-scalar-rmsprop": Window(0.025, 60),
    "vit-adam": Window(6e-3, 320),
    "vit-scalar-adam": Window(0.06, 1400),
    "vit-nadam": Window(1e-3, 220),
    "vit-scalar-nadam": Window(0.1, 600),
}
SAMPLES = {"mlp": 100, "cnn": 50, "vit": 50}
WITHOUT_MOMENTUM = ("gd", "rmsprop", "scalar-rmsprop")
RANKS = {"central": 2}


class Model(NamedTuple):
    """A flow of the table, and the optimizers that it serves."""

    build: Callable[..., rj.flows.Flow]
    served: tuple[str, ...]


def models() -> dict[str, Model]:
    """All flows but those of gradient descent alone, and a bundle of three rods."""
    found = {}
    for name, record in rj.flows.REGISTRY.items():
        if record.serves == "gradient descent":
            continue
        served = tuple(OPTIMIZERS) if record.serves == "any" else WITHOUT_MOMENTUM
        options = {"rank": RANKS[name]} if name in RANKS else {}
        found[name] = Model(partial(record.build, **options), served)
        if name == "rod":
            found["bundle"] = Model(partial(record.build, rank=3), WITHOUT_MOMENTUM)
    return found


FLOWS = models()
EVERY = 5
# Sharpness over threshold from which on a run counts as being at the threshold.
AT_THRESHOLD = 0.9
SHARE = 0.5


def share_at_threshold(ratio: Any) -> float:
    """Of the saved steps of a run, the share at the threshold."""
    return float(np.mean(np.asarray(ratio) >= AT_THRESHOLD))


def choose(dynamics: rj.Dynamics, params: Any, window: Window) -> float:
    """The least learning rate of a grid that spends enough steps at the threshold."""
    lrs = 1e-4 * 2.0 ** np.arange(0, 16, 0.5)
    edge = (rj.edge_of_stability(dynamics),)
    # Few at a time from below: larger ones are not needed, and diverge.
    for some in np.split(lrs, 8):
        data = rj.sweep(
            dynamics,
            params,
            window.steps,
            grid={"lr": some},
            warmup=window.warmup,
            every=10,
            metrics=edge,
        ).sel(flow="run")
        for lr in some:
            lane = data.sel(lr=lr)
            ratio = lane.sharpness_ratio
            # Some room, since the run itself is looked at more often; not just near.
            enough = share_at_threshold(ratio) >= 1.2 * SHARE and ratio.max() > 1
            if enough and np.isnan(float(lane.diverged_at)):
                return float(lr)
    raise RuntimeError("no learning rate reaches the threshold for half of the steps")


# The optimizer's whole state at the centre, for what is computed from it afterwards.
STATES = rj.Metric(
    lambda snapshot, *, lr: (),
    lambda snapshot, carry, *, lr: ({"state": snapshot.centre}, carry),
)


def measure(problem: problems.Problem, optimizer: str, window: Window, out: Path):
    """All figures of one row, whose picture and trajectories go to `out`."""
    dynamics = rj.dynamics(OPTIMIZERS[optimizer], problem.loss)
    lr, warmup, steps = window
    lr = choose(dynamics, problem.params, window) if lr is None else lr

    # Compiled once for all trajectories, which is why it is not recorded along them.
    @jax.jit
    def curvature(states: rj.State) -> dict[str, jax.Array]:
        def at(guess, state):
            top = rj.sharpness_ratio(dynamics, state, lr=lr, guess=guess)
            accuracy = problem.metrics["accuracy"](state.params)
            return top.vector, {"sharpness_ratio": top.value, "accuracy": accuracy}

        return jax.lax.scan(at, optax.tree.ones_like(problem.params), states)[1]

    def with_curvature(path: rj.Trajectory) -> rj.Trajectory:
        metrics = dict(path.metrics)
        more = curvature(metrics.pop("state"))
        return dataclasses.replace(path, metrics=metrics | more)

    common: dict[str, Any] = {"lr": lr, "every": EVERY, "metrics": (STATES,)}
    start = rj.warm_up(dynamics, problem.params, warmup, lr=lr)
    run = with_curvature(rj.descend(dynamics, start, steps, **common))
    ratio = run.metrics["sharpness_ratio"]
    found: dict[str, Any] = {
        "lr": lr,
        "warmup": warmup,
        "steps": steps,
        "share at threshold": share_at_threshold(ratio),
        "highest ratio": float(ratio.max()),
        "accuracy": float(run.metrics["accuracy"][-1]),
        "diverged at": float(run.diverged_at),
        "flows": {},
    }
    paths = {}
    for name, (build, served) in FLOWS.items():
        if optimizer not in served:
            continue
        began = time.perf_counter()
        path = rj.integrate(build(dynamics), start, steps, **common)
        paths[name] = with_curvature(path)
        summary = rj.compare(run, paths[name]).summary()
        summary["seconds"] = time.perf_counter() - began
        found["flows"][name] = summary
    name = f"{problem.name}, {optimizer}, lr {lr:.3g}"
    rj.plot(run, paths, name).savefig(out.with_suffix(".png"), dpi=100)
    rj.dataset(run, paths, lr=lr).to_netcdf(out.with_suffix(".nc"), engine="h5netcdf")
    # Compiled programs of all rows together exhaust the compiler's memory.
    jax.clear_caches()
    # As it is written, for JSON has no NaN.
    return jax.tree.map(lambda x: x if math.isfinite(x) else None, found)


def is_of(found: Mapping[str, Any] | None, window: Window) -> bool:
    """Whether a row has been measured, and on this window."""
    if found is None:
        return False
    lr = found["lr"] if window.lr is None else window.lr
    return (found["lr"], found["warmup"], found["steps"]) == (lr, *window[1:])


def relative(found: Mapping[str, Any], flow: str) -> tuple[float, float]:
    """Final and mean distance in units of the stable's; infinite if it diverged."""
    own, base = found["flows"][flow], found["flows"]["stable"]
    if own["diverged_at"] is not None:
        return math.inf, math.inf
    final, mean = (own[key] / base[key] for key in ("final_distance", "mean_distance"))
    return final, mean


def cells(name: str, found: Mapping[str, Any]) -> list[str]:
    """One row of the table."""

    def ratio(found: float | None) -> str:
        return "-" if found is None else f"{found:.2f}"

    medians = {
        flow: ratio(own["median_sharpness_ratio"])
        for flow, own in found["flows"].items()
    }
    figures = [
        "{:.3f} / {:.3f} / {}".format(*relative(found, flow), medians[flow])
        if flow in found["flows"]
        else ""
        for flow in FLOWS
        if flow != "stable"
    ]
    return [
        f"{name} {found['lr']:.3g}, {found['warmup']}+{found['steps']}",
        f"{found['share at threshold']:.2f}",
        ratio(found["highest ratio"]),
        f"{found['flows']['stable']['final_distance']:.3g} / {medians['stable']}",
        *figures,
    ]


def conclude(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Medians over the rows, the worst one, and the rows that do not count."""
    print(f"\nOver {len(rows)} rows, relative to the stable flow, final / mean:")
    for flow in FLOWS:
        own = [relative(one, flow) for one in rows.values() if flow in one["flows"]]
        if not own or flow == "stable":
            continue
        print(
            "  {}: median {:.3f} / {:.3f}, worst {:.3f} / {:.3f}".format(
                flow, *np.median(own, axis=0), *np.max(own, axis=0)
            )
        )
    for name, one in rows.items():
        if one["share at threshold"] < SHARE:
            print(f"{name}: only {one['share at threshold']:.0%} at the threshold")


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "accuracy")
    parser.add_argument("--rows", default=",".join(WINDOWS), help="comma-separated")
    parser.add_argument("--cifar10", metavar="PATH", help="in place of digits")
    parser.add_argument("--n", type=int, help=f"samples; else {SAMPLES}")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples")
    parser.add_argument("--float64", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.float64)
    jax.config.update("jax_default_matmul_precision", "highest")
    wanted = words(options.rows)
    if unknown := set(wanted) - set(WINDOWS):
        parser.error(f"--rows: unknown {sorted(unknown)}; choose from {list(WINDOWS)}")

    read = (
        partial(problems.cifar10, options.cifar10)
        if options.cifar10
        else problems.digits
    )
    settings: dict[str, Any] = {
        "data": "cifar10" if options.cifar10 else "digits",
        "n": SAMPLES if options.n is None else dict.fromkeys(SAMPLES, options.n),
        "seed": options.seed,
        "dtype": "float64" if options.float64 else "float32",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "accuracy.json"
    saved = json.loads(file.read_text()) if file.exists() else settings | {"rows": {}}
    if {key: saved[key] for key in settings} != settings:
        parser.error(f"--out {options.out} holds rows of other settings: give another")

    titles = (
        "row, lr, window",
        "at threshold",
        "highest",
        "stable: final, S/threshold",
    )
    flows = [f"{flow}: final / mean / S" for flow in FLOWS if flow != "stable"]
    print(head([*titles, *flows]))
    for name in wanted:
        network, optimizer = name.split("-", 1)
        window = Window() if options.cifar10 else WINDOWS[name]
        if not is_of(saved["rows"].get(name), window):
            n = settings["n"][network]
            data = read(n=n, skip=n * options.seed)
            problem = NETWORKS[network](data, seed=options.seed)
            saved["rows"][name] = measure(
                problem, optimizer, window, options.out / name
            )
            write(file, saved, indent=1)
        print(row(cells(name, saved["rows"][name])), flush=True)
    conclude({name: saved["rows"][name] for name in wanted})


if __name__ == "__main__":
    main()
