"""`rodjax run`: an optimizer beside its flows, as a table, files and a plot."""

import json
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import typer

import rodjax.sweeps as sweeps
from rodjax.cli import _names as choices
from rodjax.cli import _shared as shared
from rodjax.cli._progress import Bar
from rodjax.cli._shared import cell, number
from rodjax.cli._sweep import tell
from rodjax.flows import PeriodWarning
from rodjax.optimizer import dynamics as make_dynamics
from rodjax.optimizer import warm_up
from rodjax.report import plot_run
from rodjax.solve import NUDGED, RUN, SUMMARIES, last_finite

if TYPE_CHECKING:
    import xarray

COMPLEMENTARITY = "complementarity"
# A residual from which on it is no solution.
UNHELD = 1e-2
# Bytes that a file of labels alone takes, at most.
MARGIN = 1_000_000
SUMMARY, RESULT, PLOT = FILES = ("summary.json", "result.nc", "plot.png")
COLUMNS = {
    "final_distance": "final distance",
    "mean_distance": "mean distance",
    "final_loss": "final loss",
    "final_sharpness_ratio": "final S/threshold",
    "median_sharpness_ratio": "median S/threshold",
    "update_evaluations": "evaluations",
}
# Of the run beside itself, nudged by a rounding error.
OF_LIMIT = ("final_distance", "mean_distance", "update_evaluations")
LAST = ("diverged_at",)


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
    substeps: shared.Substeps = None,
    solver: shared.Solver = None,
    float64: shared.Float64 = True,
    every: shared.Every = 1,
    out: Annotated[
        Path, typer.Option(help="Directory written to, and gone on from.")
    ] = Path("rodjax-run"),
    overwrite: Annotated[
        bool, typer.Option(help="Replace what the directory holds.")
    ] = False,
) -> None:
    """Run an optimizer and its flows on one problem, and compare them.

    The same command again goes on where it was stopped.
    """
    dtype = shared.configure(float64)
    bar: Bar | None = None
    with shared.refusing("run", unless=lambda: bar is not None and bar.moved):
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
        method = choices.solver(solver) if solver else None
        _prepare(out, overwrite)
        told: dict[str, Any] = {
            "problem": chosen.name,
            "optimizer": optimizer,
            "lr": lr,
            "dtype": shared.precision(chosen),
            "threshold": number(edge),
        }
        more = {
            "problem_settings": json.dumps(problem_settings or []),
            "settings": json.dumps(hyperparameters),
            "rank": "each flow's own" if rank is None else rank,
        }
        known = {key: value for key, value in told.items() if value is not None}
        with Bar() as bar, _or_overwrite():
            bar.begin(optimizer, warmup + steps)
            data = sweeps.sweep(
                dynamics,
                chosen.params,
                steps,
                # One lane, which is stored and gone on with as those of a grid are.
                grid={"lr": lr},
                flows=models,
                warmup=warmup,
                every=every,
                metrics=shared.metrics(dynamics, chosen, ratio=exists),
                solver=method,
                substeps=substeps,
                devices=jax.devices()[:1],
                out=out,
                settings=known | more,
                progress=partial(tell, bar, out),
                predictability=True,
            )
            if not bar.moved:
                bar.say(f"nothing left to do of {bar.total} steps in {out}")
    with data:
        head = told | {"steps": steps, "warmup": warmup}
        _report(data, head, list(chosen.metrics), out)
        if remark:
            print(remark)
        for name in models:
            held = data.get(COMPLEMENTARITY, 0 * data.loss).sel(flow=name).values
            finite = np.isfinite(held)
            if (worst := np.max(held, initial=0.0, where=finite)) > UNHELD:
                print(
                    f"{name} is not to be trusted: its complementarity problem was "
                    f"left with a residual of up to {worst:.2g} (nothing holds the "
                    "edge)"
                )


@contextmanager
def _or_overwrite() -> Iterator[None]:
    """Say what else can be done about a directory that holds another run."""
    try:
        yield
    except ValueError as error:
        if "with other settings" not in str(error):
            raise
        raise ValueError(f"{error}, or --overwrite") from error


def _prepare(out: Path, overwrite: bool) -> None:
    """Make the directory, or refuse it; with `overwrite` empty it of a run."""
    if overwrite:
        sweeps.forget(out)
    else:
        shared.check_out(out, FILES)
    shared.prepare(out, FILES if overwrite else (), overwrite)
    # HDF5 does not survive a disk that fills up while it writes.
    if (room := shutil.disk_usage(out).free) < MARGIN:
        message = f"rodjax run: no room left for {out / RESULT} ({room} bytes free)"
        typer.secho(message, err=True, fg="red")
        raise typer.Exit(1)


def _report(
    data: "xarray.Dataset", head: dict[str, Any], own: list[str], out: Path
) -> None:
    """Write and print what a run and its flows have come to."""

    def row(name: str, keys: Iterable[str]) -> dict[str, float | None]:
        lane = data.sel(flow=name)
        found = {key: lane[key].item() for key in (*SUMMARIES, *LAST) if key in lane}
        found["update_evaluations"] = lane["evaluations"].item()
        found |= {f"final_{metric}": last_finite(lane[metric].values) for metric in own}
        return {key: number(found.get(key, math.nan)) for key in keys}

    finals = [f"final_{metric}" for metric in own]
    of_flow = [*COLUMNS, *LAST, *finals]
    flows = [name for name in data.flow.values.tolist() if name not in (RUN, NUDGED)]
    summary: dict[str, Any] = head | {
        "run": row(RUN, ["final_loss", *finals, *LAST]),
        NUDGED: row(NUDGED, [*OF_LIMIT, *LAST]),
        "flows": {name: row(name, of_flow) for name in flows},
    }
    part = out / f"{SUMMARY}.part"
    part.write_text(json.dumps(summary, indent=2) + "\n")
    part.replace(out / SUMMARY)
    title = "{problem}, {optimizer}, lr {lr:g}, {dtype}".format(**summary)
    plot_run(data, title).savefig(out / PLOT, dpi=120)
    _print(summary, out)


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
