"""`rodjax sweep`: an optimizer and its flows on a whole grid."""

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import typer

import rodjax.sweeps as sweeps
from rodjax.cli import _axes as axes
from rodjax.cli import _names as choices
from rodjax.cli import _own as own
from rodjax.cli import _shared as shared
from rodjax.cli import _summary as report
from rodjax.cli._progress import Bar
from rodjax.optimizer import dynamics as make_dynamics
from rodjax.report import plot_lanes, plot_sweep
from rodjax.sweeps import SEED, Status, cores, make_grid

if TYPE_CHECKING:
    import xarray

FILES = ("summary.json", "result.nc", "lr.png", "lanes.png")


def sweep(
    problem: shared.ProblemName = "digits-mlp",
    problem_settings: shared.ProblemSettings = None,
    optimizer: shared.OptimizerName = "gd",
    settings: shared.Settings = None,
    lr: Annotated[
        str,
        typer.Option(
            help="Learning rates: FROM:TO:COUNTlog, FROM:TO:COUNT, a list or a number."
        ),
    ] = "0.05:0.8:16log",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUES, written like --lr, for a hyperparameter of the "
            f"optimizer's constructor, or {axes.FLOOR} of the flows' oscillation."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Draw so many initial weights, of seeds 0, 1, ..."),
    ] = None,
    together: Annotated[
        list[str] | None,
        typer.Option("--zip", help="NAME,NAME of axes that vary together."),
    ] = None,
    steps: shared.Steps = 400,
    warmup: shared.Warmup = 20,
    flows: shared.FlowNames = "stable,modulated",
    rank: shared.Rank = None,
    substeps: shared.Substeps = None,
    solver: shared.Solver = None,
    float64: shared.Float64 = True,
    every: shared.Every = 4,
    limit: Annotated[
        bool,
        typer.Option("--limit", help="The predictability limit beside the flows."),
    ] = False,
    lanes: Annotated[
        int | None,
        typer.Option(help="Lanes computed at a time.", show_default="what fits"),
    ] = None,
    time_chunk: Annotated[
        int | None,
        typer.Option(help="Steps computed at a time.", show_default="a twentieth"),
    ] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="One of several processes, which JAX finds itself."
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Directory written to, and gone on from.")
    ] = Path("rodjax-sweep"),
) -> None:
    """Run an optimizer and its flows on a grid, and see where each breaks down.

    The same command again goes on where it was stopped.
    """
    dtype = shared.configure(float64)
    bar: Bar | None = None
    with shared.refusing("sweep", unless=lambda: bar is not None and bar.moved):
        shared.check_steps(warmup, steps, every, substeps)
        grid = axes.grid(lr, axis or [], seeds, together or [])
        points = make_grid(grid)
        if distributed:
            jax.distributed.initialize()
        else:
            _use_cores(points.lanes)
        hyperparameters = dict(map(choices.hyperparameter, settings or []))
        chosen = shared.problem(problem, dtype, problem_settings)
        if SEED in points.values and chosen.draw is None:
            advice = (
                "give its Problem a draw, a function of a jax.random key to parameters"
                if own.is_own(problem)
                else "choose a network, quadratic or factorization"
            )
            raise ValueError(f"--seeds: the start of {problem} is not drawn; {advice}")
        names, wanted = set(points.values), shared.flow_names(flows)
        floor = axes.FLOOR in names
        having = [name for name, record in choices.FLOWS.items() if record.floor]
        if floor and not {name.partition(":")[0] for name in wanted} & set(having):
            raise ValueError(
                f"--axis {axes.FLOOR}: none of the flows has one; add one of "
                f"{', '.join(having)}"
            )
        others = [n for n in points.values if n not in ("lr", SEED, axes.FLOOR)]
        if others or floor:
            build = choices.optimizer_family(optimizer, hyperparameters, others)
        else:
            build = shared.optimizer(optimizer, hyperparameters)
        dynamics = make_dynamics(build, chosen.loss)
        models = shared.build_flows(
            wanted,
            dynamics,
            chosen,
            rank=rank,
            floor=(lambda h: h[axes.FLOOR]) if floor else None,
        )
        method = choices.solver(solver) if solver else None
        shared.check_out(out, FILES)
        first, total = jax.process_index() == 0, points.lanes * (warmup + steps)
        head: dict[str, Any] = {
            "problem": chosen.name,
            "optimizer": optimizer,
            "problem_settings": json.dumps(problem_settings or []),
            "settings": json.dumps(hyperparameters),
            "dtype": shared.precision(chosen),
            "rank": "each flow's own" if rank is None else rank,
        }
        drawn = SEED in points.values
        with Bar(shown=first) as bar:
            bar.begin("sweep", total)
            data = sweeps.sweep(
                dynamics,
                None if drawn else chosen.params,
                steps,
                draw=chosen.draw if drawn else None,
                grid=grid,
                flows=models,
                warmup=warmup,
                every=every,
                metrics=shared.metrics(dynamics, chosen),
                solver=method,
                substeps=substeps,
                lane_chunk=lanes,
                time_chunk=time_chunk,
                out=out,
                settings=head,
                progress=partial(tell, bar, out),
                predictability=limit,
            )
            if not bar.moved:
                bar.say(f"nothing left to do of {total} steps in {out}")
    with data:
        if first:
            _report(data, out)


def tell(bar: Bar, out: Path, status: Status) -> None:
    """Show how far a sweep is, first of all how far an earlier call had got."""
    if status.resumed and not bar.moved:
        bar.say(f"going on from {status.resumed} of {status.total} steps in {out}")
    bar.move(status.done, describe(status))


def _use_cores(lanes: int) -> None:
    """Make each core of a CPU a device of JAX, so that lanes are spread over them."""
    config: Any = jax.config
    flags = os.environ.get("XLA_FLAGS", "")
    forced = "xla_force_host_platform_device_count" in flags
    if forced or config.jax_num_cpu_devices > 0:
        return
    devices = min(cores(), lanes)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        # JAX has started already, with the devices that it has.
        return
    # XLA's threads: where each is busy with a device, those wait for others forever.
    os.environ.setdefault("NPROC", str(2 * devices))


def describe(status: Status) -> str:
    """Lanes, speed and time left, of a `Status`."""
    alive = status.lanes - status.diverged
    # What an earlier call has done says nothing of this one's speed.
    rate = (status.done - status.resumed) / max(status.seconds, 1e-9)
    left = round((status.total - status.done) / rate)
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return (
        f"{alive} alive, {status.diverged} diverged, {rate:.4g} steps/s, {clock} left"
    )


def _report(data: "xarray.Dataset", out: Path) -> None:
    of_problem = ("problem", "problem_settings", "optimizer", "settings")
    keys = (*of_problem, "dtype", "steps", "warmup", "every")
    summary = report.summarize(data, {key: _plain(data.attrs[key]) for key in keys})
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = "{problem}, {optimizer}, {lanes} lanes, steps {warmup} + {steps}, {dtype}"
    title = title.format(**summary)
    plot_sweep(data, title=title).savefig(out / "lr.png", dpi=120)
    plot_lanes(data, title=title).savefig(out / "lanes.png", dpi=120)
    print(title)
    for line in report.table(data):
        print(line)
    shared.written(out, FILES)


def _plain(value: Any) -> Any:
    """An attribute as read from the file, as JSON has it."""
    return value.item() if isinstance(value, np.generic) else value
