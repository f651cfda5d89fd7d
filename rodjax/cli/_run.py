"""`rodjax run`: an optimizer beside its flows, as a table, files and a plot."""

import json
import math
import shutil
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

from rodjax.cli import _names as choices
from rodjax.cli import _shared as shared
from rodjax.cli._progress import Bar
from rodjax.cli._shared import cell, number
from rodjax.flows import PeriodWarning
from rodjax.optimizer import dynamics as make_dynamics
from rodjax.optimizer import warm_up
from rodjax.problems import Problem
from rodjax.report import dataset, plot
from rodjax.solve import (
    NUDGED,
    Trajectory,
    compare,
    descend,
    integrate,
    last_finite,
    predictability,
)

COMPLEMENTARITY = "complementarity"
# A residual from which on it is no solution.
UNHELD = 1e-2
PART = "result.nc.part"
# Bytes that a file of labels alone takes, at most.
MARGIN = 1_000_000
FILES = ("summary.json", "result.nc", "plot.png")
COLUMNS = {
    "final_distance": "final distance",
    "mean_distance": "mean distance",
    "final_loss": "final loss",
    "final_sharpness_ratio": "final S/threshold",
    "median_sharpness_ratio": "median S/threshold",
    "update_evaluations": "evaluations",
    "seconds": "seconds",
}
# Of the run beside itself, nudged by a rounding error.
OF_LIMIT = ("final_distance", "mean_distance", "update_evaluations", "seconds")


def run(
    problem: shared.ProblemName = "digits-mlp",
    problem_settings: shared.ProblemSettings = None,
    optimizer: shared.OptimizerName = "gd",
    settings: shared.Settings = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.6,
    steps: shared.Steps = 420,
    warmup: shared.Warmup = 20,
    flows: shared.FlowNames = "stable,rod,modulated",
    rank: shared.Rank = None,
    substeps: shared.Substeps = 4,
    solver: shared.Solver = "heun",
    float64: shared.Float64 = True,
    every: shared.Every = 1,
    out: Annotated[Path, typer.Option(help="Directory written to.")] = Path(
        "rodjax-run"
    ),
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier run's files.")
    ] = False,
) -> None:
    """Run an optimizer and its flows on one problem, and compare them."""
    dtype = shared.configure(float64)
    with shared.refusing("run"):
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"--lr {lr}: it must be positive and finite")
        shared.check_steps(warmup, steps, every, substeps)
        hyperparameters = dict(map(choices.hyperparameter, settings or []))
        chosen = shared.problem(problem, dtype, problem_settings)
        build = shared.optimizer(optimizer, hyperparameters)
        dynamics = make_dynamics(build, chosen.loss)
        edge, remark, exists = shared.edge(dynamics, chosen, lr)
        # Which the remark says.
        warnings.simplefilter("ignore", PeriodWarning)
        names = shared.flow_names(flows)
        models = shared.build_flows(names, dynamics, chosen, rank=rank)
        # Traced here, so that what cannot work is refused before anything runs.
        window = jax.eval_shape(lambda: warm_up(dynamics, chosen.params, lr=lr))
        for model in models.values():
            jax.eval_shape(
                lambda w, m=model: m.init(w, lr=lr, key=jax.random.key(0)), window
            )
        method = choices.solver(solver)
        shared.prepare(out, FILES, overwrite)

    head: dict[str, Any] = {
        "problem": chosen.name,
        "optimizer": optimizer,
        "lr": lr,
        "steps": steps,
        "warmup": warmup,
        "dtype": shared.precision(chosen),
        "threshold": number(edge),
    }
    told = {key: value for key, value in head.items() if value is not None}
    attributes = told | {
        "problem_settings": json.dumps(problem_settings or []),
        "settings": json.dumps(hyperparameters),
        "rank": "each flow's own" if rank is None else rank,
        "substeps": substeps,
        "solver": solver,
        "every": every,
    }
    common: dict[str, Any] = {
        "lr": lr,
        "every": every,
        "metrics": shared.metrics(dynamics, chosen, ratio=exists),
        # So that what the warm-up has lost counts as lost.
        "origin": chosen.params,
    }
    paths: dict[str, Trajectory] = {}
    with Bar(lines=2) as bar:
        common["progress"] = partial(_tell, bar, warmup)
        bar.begin(optimizer, steps)
        window = warm_up(dynamics, chosen.params, warmup, lr=lr)
        reference = _done(descend(dynamics, window, steps, **common))
        summary: dict[str, Any] = head | {
            "run": {
                "final_loss": number(last_finite(reference.metrics["loss"])),
                **_own(chosen, reference),
                "diverged_at": number(reference.diverged_at),
            },
            NUDGED: {},
            "flows": {},
        }
        # Written as it is done, so that a killed run loses only the flow it is in.
        _write(out, summary, reference, paths, attributes)
        began = time.perf_counter()
        bar.begin(NUDGED, steps)
        of_run = {"lr": lr, "every": every, "origin": chosen.params}
        limit = predictability(dynamics, window, steps, **of_run)
        row = limit.summary() | {"seconds": time.perf_counter() - began}
        keys = (*OF_LIMIT, "diverged_at")
        summary[NUDGED] = {key: number(row[key]) for key in keys}
        bar.move(steps, f"final distance {cell(summary[NUDGED]['final_distance'])}")
        for name, model in models.items():
            began = time.perf_counter()
            bar.begin(name, steps)
            path = integrate(
                model, window, steps, solver=method, substeps=substeps, **common
            )
            paths[name] = _done(path)
            row = compare(reference, paths[name]).summary()
            row["seconds"] = time.perf_counter() - began
            summary["flows"][name] = {
                key: number(row[key]) for key in (*COLUMNS, "diverged_at")
            } | _own(chosen, paths[name])
            _write(out, summary, reference, paths, attributes)
    title = "{problem}, {optimizer}, lr {lr:g}, {dtype}".format(**summary)
    figure = plot(reference, paths, title, predictability=limit)
    figure.savefig(out / "plot.png", dpi=120)
    _print(summary, out)
    if remark:
        print(remark)
    for name, path in paths.items():
        held = np.asarray(path.metrics.get(COMPLEMENTARITY, 0.0))
        if (worst := np.max(held, initial=0.0, where=np.isfinite(held))) > UNHELD:
            print(
                f"{name} is not to be trusted: its complementarity problem was left "
                f"with a residual of up to {worst:.2g} (nothing holds the edge)"
            )


def _tell(bar: Bar, warmup: int, step: Any, loss: Any) -> None:
    """Show how far a run or a flow is; steps may be half-integers."""
    done = int(step) - warmup
    bar.move(done, f"{done} of {bar.total} steps, loss {float(loss):.6g}")


def _done(path: Trajectory) -> Trajectory:
    """Computed, and its last step shown."""
    path = jax.block_until_ready(path)
    jax.effects_barrier()
    return path


def _own(problem: Problem, path: Trajectory) -> dict[str, float | None]:
    """The last values of the problem's own metrics."""
    return {
        f"final_{name}": number(last_finite(path.metrics[name]))
        for name in problem.metrics
    }


def _write(
    out: Path,
    summary: dict[str, Any],
    reference: Trajectory,
    paths: dict[str, Trajectory],
    attributes: dict[str, Any],
) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    data = dataset(reference, paths, **attributes)
    # HDF5 does not survive a disk that fills up while it writes.
    if (room := shutil.disk_usage(out).free) < data.nbytes + MARGIN:
        message = (
            f"rodjax run: no room left for {out / 'result.nc'} ({room} bytes free)"
        )
        typer.secho(message, err=True, fg="red")
        raise typer.Exit(1)
    # A file cut off in mid-write must not take the place of a whole one.
    data.to_netcdf(out / PART, engine="h5netcdf")
    (out / PART).replace(out / "result.nc")


def _print(summary: dict[str, Any], out: Path) -> None:
    print(
        "{problem}, {optimizer}, lr {lr:g}, steps {warmup} + {steps}, {dtype}; "
        f"stability threshold {cell(summary['threshold'])}".format(**summary)
    )
    print(f"run: {_cells(summary['run'])}")
    width = max(map(len, COLUMNS.values()))
    columns = {NUDGED: summary[NUDGED]} | summary["flows"]
    names = list(columns)
    print(" " * width + "".join(f"{name:>14}" for name in names))
    more = [key for key in summary["run"] if key not in (*COLUMNS, "diverged_at")]
    labels = COLUMNS | {key: key.replace("_", " ") for key in more}
    for key, label in labels.items():
        cells = (cell(columns[name].get(key)) for name in names)
        print(f"{label:{width}}" + "".join(f"{text:>14}" for text in cells))
    for name in names:
        if (step := columns[name]["diverged_at"]) is not None:
            print(f"{name} diverged at step {step:g}")
    shared.written(out, FILES)


def _cells(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {cell(value)}" for key, value in row.items()
    )
