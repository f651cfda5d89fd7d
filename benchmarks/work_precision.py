"""Work and precision: what a flow costs under a solver, and how close it then stays.

Each point is a flow and a solver on one problem: the mean distance of the flow's centre
from the run's midpoints, relative to the stable flow's (Heun, four substeps), against
the evaluations of the update map for an optimizer step, and against the wall time over
that of the plain jitted Optax loop, the least of several runs in turn. Saved at every
tenth step, no metrics, without compilation. The frontier joins the points that no other
one beats in both; below the line `limit` nothing can be told apart, for there the run
differs from itself as much, nudged by one rounding error. Euler's method with a step of
one is not here: it is the optimizer.

    python benchmarks/work_precision.py
    python benchmarks/work_precision.py --rows mlp-gd --flows unit --solvers rkc --redo
    python benchmarks/work_precision.py --tiny --out tiny

It goes on from what `work-precision.json` has; `--redo` measures the chosen again.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import optax
from _common import arguments, head, row, seconds, words, write
from _rows import FLOWS as MODELS
from _rows import OPTIMIZERS, SAMPLES, served

import rodjax as rj
from rodjax import flows, problems

EVERY, REPEATS = 10, 3
APART = 0.9
FIGURES = ("error", "evaluations", "times plain")


class Task(NamedTuple):
    """A problem, an optimizer, and the steps compared."""

    problem: Callable[[], problems.Problem]
    optimizer: str
    lr: float
    warmup: int
    steps: int


class Way(NamedTuple):
    """How a flow is solved: `rtol` of an adaptive controller, or constant steps.

    `unit` is said of flows whose field is the increment of a unit step: True for those
    alone, False for others alone, None for all.
    """

    solver: Callable[[], diffrax.AbstractSolver]
    substeps: float = 4
    rtol: float | None = None
    unit: bool | None = None

    def options(self) -> dict[str, Any]:
        """What `integrate` takes."""
        found: dict[str, Any] = {"solver": self.solver(), "substeps": self.substeps}
        if self.rtol is not None:
            least = {"dtmin": 2.0, "force_dtmin": True} if self.unit else {}
            found["stepsize_controller"] = diffrax.PIDController(
                rtol=self.rtol, atol=1e-2 * self.rtol, **least
            )
        return found


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def digits(build: Any, n: int) -> problems.Problem:
    """A network on digits, in float64."""
    return build(problems.digits(n))


TASKS: Mapping[str, Task] = {
    "mlp-gd": Task(partial(digits, problems.mlp, SAMPLES["mlp"]), "gd", 0.6, 20, 640),
    "mlp-rmsprop": Task(
        partial(digits, problems.mlp, SAMPLES["mlp"]), "rmsprop", 8e-4, 20, 600
    ),
    "mlp-adam": Task(
        partial(digits, problems.mlp, SAMPLES["mlp"]), "adam", 0.025, 20, 600
    ),
    "cnn-gd": Task(partial(digits, problems.cnn, SAMPLES["cnn"]), "gd", 0.38, 20, 400),
    "berthier": Task(problems.berthier, "gd", 0.3, 400, 1000),
}
LONG = partial(rj.RKC, bea=True)
SOLVERS: Mapping[str, Way] = {
    "euler x 2": Way(diffrax.Euler, 2),
    "euler x 3": Way(diffrax.Euler, 3),
    "heun x 1": Way(diffrax.Heun, 1),
    "heun x 2": Way(diffrax.Heun, 2),
    "heun x 4": Way(diffrax.Heun, 4),
    "tsit5 x 1": Way(diffrax.Tsit5, 1),
    "bosh3 1e-3": Way(diffrax.Bosh3, 4, 1e-3),
    "tsit5 1e-3": Way(diffrax.Tsit5, 4, 1e-3),
    "tsit5 1e-2": Way(diffrax.Tsit5, 4, 1e-2),
    "kvaerno3 1e-3": Way(diffrax.Kvaerno3, 4, 1e-3),
    "rkc x 1": Way(rj.RKC, 1, unit=False),
    "rkc x 1/2": Way(rj.RKC, 1 / 2, unit=False),
    "rkc 1e-2": Way(rj.RKC, 1, 1e-2, unit=False),
    "rkc 3e-2": Way(rj.RKC, 1, 3e-2, unit=False),
    "rkc 1e-1": Way(rj.RKC, 1, 1e-1, unit=False),
    "rkc+bea x 1/2": Way(LONG, 1 / 2, unit=True),
    "rkc+bea x 1/4": Way(LONG, 1 / 4, unit=True),
    "rkc+bea 1e-3": Way(LONG, 1 / 2, 1e-3, unit=True),
    "rkc+bea 1e-2": Way(LONG, 1 / 2, 1e-2, unit=True),
    "rkc+bea 3e-2": Way(LONG, 1 / 2, 3e-2, unit=True),
    "rkc+bea 1e-1": Way(LONG, 1 / 2, 1e-1, unit=True),
}
# An implicit solver factorizes the Jacobian of the whole state.
IMPLICIT, SMALL = ("kvaerno3 1e-3",), 50
# What is tried of every flow, and of the two below on the reference problem all.
USUAL = (
    *("heun x 1", "heun x 4", "tsit5 1e-3"),
    *("rkc 1e-2", "rkc+bea x 1/2", "rkc+bea 1e-2"),
)
# What they are solved by if nothing is said, where that is not usual.
EULER = "euler x 2", "euler x 3"
OWN = {"modulated": EULER, "modulated-3": EULER, "central": ("heun x 2",)}
REFERENCE = "mlp-gd"
POLAR = "modulated, polar"
UNIT = "modulated, unit"


def unit_modulated(dynamics: rj.Dynamics) -> rj.Flow:
    """Its plain increments: corrected by the solver."""
    return flows.polar(flows.modulated(dynamics, degree=1), unit=True)


def choices(optimizer: str) -> dict[str, Callable[..., rj.Flow]]:
    """The flows that serve an optimizer."""
    found = {name: MODELS[name].build for name in served(optimizer, MODELS)}
    found[POLAR] = lambda dynamics: flows.polar(flows.modulated(dynamics))
    found[UNIT] = unit_modulated
    return found


def ways(flow: str, size: int, *, whole: bool) -> list[str]:
    """The solvers that a flow is solved by."""
    unit = flow in (UNIT, "stable")
    known = SOLVERS if whole and flow in (POLAR, UNIT) else USUAL
    known = [*known, *IMPLICIT] if flow == POLAR and not whole else known
    known = [name for name in known if name not in EULER]
    known += OWN.get(flow, ())
    return [
        name
        for name in known
        if SOLVERS[name].unit in (None, unit)
        and (name not in IMPLICIT or size <= SMALL)
    ]


def plain(task: Task, problem: problems.Problem, params: Any) -> Callable[[], Any]:
    """The Optax loop alone, compiled."""
    optimizer = OPTIMIZERS[task.optimizer](task.lr)

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            grad = jax.grad(problem.loss)(params)
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=task.steps)

    return lambda: run(params)


def measure(
    task: Task, wanted: Callable[[str, str], bool], *, whole: bool
) -> Iterator[dict[str, Any]]:
    """What all points are relative to, then the points."""
    problem = task.problem()
    dynamics = rj.dynamics(OPTIMIZERS[task.optimizer], problem.loss)
    start = rj.warm_up(dynamics, problem.params, task.warmup, lr=task.lr)
    common: dict[str, Any] = {"lr": task.lr, "every": EVERY}
    run = rj.descend(dynamics, start, task.steps, **common)
    base = plain(task, problem, start.at(0).params)
    seconds(base)
    mean = lambda path: float(jnp.mean(rj.compare(run, path).distance))
    stable = mean(rj.integrate(flows.stable(dynamics), start, task.steps, **common))
    limit = rj.predictability(dynamics, start, task.steps, **common)
    yield {
        "limit": float(limit.distance.mean()) / stable,
        "stable": stable,
        "machine": f"{jax.devices()[0].device_kind}, {cores()} cores",
    }
    size = optax.tree.size(problem.params)
    for name, build in choices(task.optimizer).items():
        for way in ways(name, size, whole=whole):
            if not wanted(name, way):
                continue
            solve = partial(
                rj.integrate,
                *(build(dynamics), start, task.steps),
                **(common | SOLVERS[way].options()),
            )
            path = jax.block_until_ready(solve())
            times = [(seconds(solve), seconds(base)) for _ in range(REPEATS)]
            own, other = (min(column) for column in zip(*times, strict=True))
            yield {
                "flow": name,
                "solver": way,
                "error": mean(path) / stable,
                "evaluations": float(path.evaluations) / task.steps,
                "times plain": own / other,
                "ms a step": 1e3 * own / task.steps,
                "diverged at": float(path.diverged_at),
            }
            # Compiled programs of all points exhaust the compiler's memory.
            jax.clear_caches()
            seconds(base)


def frontier(points: list[dict[str, Any]], work: str) -> list[dict[str, Any]]:
    """The points that no other one beats in both."""
    known = [p for p in points if p[work] and p["error"] and not p["diverged at"]]
    best: list[dict[str, Any]] = []
    for point in sorted(known, key=lambda p: (p[work], p["error"])):
        if not best or point["error"] < best[-1]["error"]:
            best.append(point)
    return best


def draw(rows: Mapping[str, Any], file: Path) -> None:
    """Two panels a row: against evaluations, and against time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    axes_of = {"evaluations": "evaluations a step", "times plain": "time / plain Optax"}
    figure, panels = plt.subplots(
        len(rows), 2, figsize=(13, 4.2 * len(rows)), squeeze=False, sharey="row"
    )
    names = sorted({p["flow"] for found in rows.values() for p in found["points"]})
    colours = dict(zip(names, plt.colormaps["tab20"].colors, strict=False))
    for (name, found), pair in zip(rows.items(), panels, strict=True):
        for (work, label), axes in zip(axes_of.items(), pair, strict=True):
            for flow in names:
                here = [p for p in found["points"] if p["flow"] == flow and p[work]]
                here = [p for p in here if p["error"] and not p["diverged at"]]
                xs, ys = [p[work] for p in here], [p["error"] for p in here]
                axes.scatter(xs, ys, 26, color=colours[flow], label=flow, zorder=3)
            best = frontier(found["points"], work)
            xs, ys = [p[work] for p in best], [p["error"] for p in best]
            axes.step(xs, ys, where="post", color="0.4", lw=1, label="frontier")
            told = float("inf")
            for p in best:
                # Of points that lie upon each other the first is named.
                if p["error"] > APART * told:
                    continue
                told = p["error"]
                text = f"{p['flow'].removeprefix('modulated, ')}: {p['solver']}"
                at = (p[work], p["error"])
                axes.annotate(
                    text, at, (4, 4), textcoords="offset points", fontsize=6.5
                )
            axes.axhline(found["limit"], color="0.7", ls=":", label="limit")
            axes.set(xscale="log", yscale="log", xlabel=label, title=name)
            axes.set_ylim(0.5 * max(min(ys, default=1e-3), 1e-4), 3)
        pair[0].set_ylabel("mean distance / stable flow's")
    panels[0, 1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure, print, write and draw."""
    parser = arguments(__doc__, "work-precision")
    parser.add_argument("--rows", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--flows", default="", help="words in their names; all if none")
    parser.add_argument("--solvers", default="", help="likewise")
    parser.add_argument("--redo", action="store_true", help="measure again")
    parser.add_argument("--tiny", action="store_true", help="a few points in seconds")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore", flows.PeriodWarning)
    rows, few = words(options.rows), (words(options.flows), words(options.solvers))
    if unknown := set(rows) - set(TASKS):
        parser.error(f"--rows: unknown {sorted(unknown)}; choose from {[*TASKS]}")
    tasks = {name: TASKS[name] for name in rows}
    if options.tiny:
        tasks = {"berthier": TASKS["berthier"]._replace(warmup=20, steps=40)}
        few = few[0] or [UNIT, "stable"], few[1] or ["heun x 4", "rkc+bea x 1/2"]

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "work-precision.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    print(head(["row", "flow", "solver", *FIGURES]))
    for name, task in tasks.items():
        points = found.get(name, {}).get("points", [])
        chosen = lambda flow, way: all(
            not some or any(word in text for word in some)
            for some, text in zip(few, (flow, way), strict=True)
        )
        if options.redo:
            points = [p for p in points if not chosen(p["flow"], p["solver"])]
        known = {(p["flow"], p["solver"]) for p in points}
        wanted = lambda flow, way, known=known, chosen=chosen: (
            chosen(flow, way) and (flow, way) not in known
        )
        measured = measure(task, wanted, whole=name == REFERENCE)
        found[name] = next(measured) | {"points": points}
        for point in measured:
            figures = (f"{point[key]:.3g}" for key in FIGURES)
            print(row([name, point["flow"], point["solver"], *figures]), flush=True)
            points.append(point)
            write(file, found, indent=1)
    # As they are written: JSON has no infinity.
    draw(json.loads(file.read_text()), options.out / "work-precision.png")


if __name__ == "__main__":
    main()
