"""The command line: an optimizer beside its flows, as a table, files and a plot."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import optax
import typer

from rodjax import choices
from rodjax.compare import compare, last_finite
from rodjax.curvature import edge_of_stability
from rodjax.dynamics import dynamics as make_dynamics
from rodjax.integrate import descend, integrate
from rodjax.plotting import plot
from rodjax.results import dataset
from rodjax.stability import threshold
from rodjax.trajectory import Trajectory
from rodjax.window import warm_up

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

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def about() -> None:
    """Continuous-time models of optimizers at the edge of stability."""


@app.command()
def run(
    problem: Annotated[
        str, typer.Option(help=f"One of {', '.join(choices.PROBLEMS)}.")
    ] = "digits-mlp",
    optimizer: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(choices.OPTIMIZERS)}, or Optax's name."),
    ] = "gd",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE for the optimizer's constructor."),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.6,
    steps: Annotated[int, typer.Option(help="Optimizer steps compared.")] = 420,
    start: Annotated[int, typer.Option(help="Optimizer steps taken before.")] = 20,
    flows: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(choices.FLOWS)}.")
    ] = "stable,rod,modulated",
    rank: Annotated[int, typer.Option(help="Rank of the rod.")] = 1,
    top: Annotated[
        int, typer.Option(help="Directions of central, covariance, principal.")
    ] = 3,
    substeps: Annotated[int, typer.Option(help="Solver steps per step.")] = 4,
    solver: Annotated[str, typer.Option(help="An explicit diffrax solver.")] = "heun",
    float64: Annotated[
        bool, typer.Option("--float64/--float32", help="Precision.")
    ] = True,
    every: Annotated[int, typer.Option(help="Save every so many steps.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory written to.")] = Path(
        "rodjax-run"
    ),
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier run's files.")
    ] = False,
) -> None:
    """Run an optimizer and its flows on one problem, and compare them."""
    # TF32 products are too coarse for flows, and this process is ours to configure.
    jax.config.update("jax_enable_x64", float64)
    jax.config.update("jax_default_matmul_precision", "highest")
    names = [name.strip() for name in flows.split(",") if name.strip()]
    try:
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"--lr {lr}: it must be positive and finite")
        for flag, value, least in (("--start", start, 0), ("--substeps", substeps, 1)):
            if value < least:
                raise ValueError(f"{flag} {value}: it must be at least {least}")
        if every < 1 or steps < 1 or steps % every:
            raise ValueError(
                f"--steps {steps} must be a positive multiple of --every {every}"
            )
        hyperparameters = dict(map(choices.setting, settings or []))
        chosen = choices.problem(problem, "float64" if float64 else "float32")
        dynamics = make_dynamics(
            choices.optimizer(optimizer, hyperparameters), chosen.loss
        )
        edge = threshold(dynamics, chosen.params, lr=lr)
        # Traced here, so that what cannot work is refused before anything runs.
        size = optax.tree.size(chosen.params)
        models = {
            name: choices.flow(name, dynamics, size=size, rank=rank, top=top)
            for name in names
        }
        window = jax.eval_shape(lambda: warm_up(dynamics, chosen.params, lr=lr))
        for model in models.values():
            jax.eval_shape(lambda w, m=model: m.init(w, lr, jax.random.key(0)), window)
        method = choices.solver(solver)
        _prepare(out, overwrite)
    except (ValueError, TypeError, ImportError) as error:
        typer.secho(f"rodjax run: {error}", err=True, fg="red")
        raise typer.Exit(2) from None

    head: dict[str, Any] = {
        "problem": problem,
        "optimizer": optimizer,
        "lr": lr,
        "steps": steps,
        "start": start,
        "dtype": "float64" if float64 else "float32",
        "threshold": _number(edge),
    }
    attributes = head | {
        "settings": json.dumps(hyperparameters),
        "rank": rank,
        "top": top,
        "substeps": substeps,
        "solver": solver,
        "every": every,
    }
    meter = Meter(start, steps)
    common: dict[str, Any] = {
        "lr": lr,
        "every": every,
        "metrics": (edge_of_stability(dynamics),),
        "progress": meter,
    }
    meter.begin(optimizer)
    window = warm_up(dynamics, chosen.params, start, lr=lr)
    reference = jax.block_until_ready(descend(dynamics, window, steps, **common))
    meter.end()
    summary: dict[str, Any] = head | {
        "run": {
            "final_loss": _number(last_finite(reference.metrics["loss"])),
            "diverged_at": _number(reference.diverged_at),
        },
        "flows": {},
    }
    paths: dict[str, Trajectory] = {}
    # Written as it is done, so that a killed run loses only the flow it is in.
    _write(out, summary, reference, paths, attributes)
    for name, model in models.items():
        began = time.perf_counter()
        meter.begin(name)
        paths[name] = jax.block_until_ready(
            integrate(model, window, steps, solver=method, substeps=substeps, **common)
        )
        meter.end()
        row = compare(paths[name], reference).summary()
        row["seconds"] = time.perf_counter() - began
        summary["flows"][name] = {
            key: _number(row[key]) for key in (*COLUMNS, "diverged_at")
        }
        _write(out, summary, reference, paths, attributes)
    title = "{problem}, {optimizer}, lr {lr:g}, {dtype}".format(**summary)
    plot(reference, paths, title).savefig(out / "plot.png", dpi=120)
    _print(summary, out)


class Meter:
    """Progress on stderr: steps done and loss, a few times a second."""

    def __init__(self, start: int, steps: int):
        self.start, self.steps = start, steps
        self.name, self.shown = "", 0.0

    def begin(self, name: str) -> None:
        """Start a line for `name`."""
        self.name, self.shown = name, 0.0
        sys.stderr.write(f"\r{name:>14}: compiling")
        sys.stderr.flush()

    def __call__(self, step: Any, loss: Any) -> None:
        """Show that `step` is done, if something was not shown just now."""
        done = int(step) - self.start
        if time.monotonic() - self.shown > 0.2 or done == self.steps:
            self.shown = time.monotonic()
            sys.stderr.write(
                f"\r{self.name:>14}: {done}/{self.steps} steps, loss {float(loss):.6f} "
            )
            sys.stderr.flush()

    def end(self) -> None:
        """Wait for the last step to be shown and end the line."""
        jax.effects_barrier()
        sys.stderr.write("\n")


def _prepare(out: Path, overwrite: bool) -> None:
    import xarray  # noqa: F401  (to fail before the run, not after it)

    found = [name for name in FILES if (out / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"--out {out} already holds {', '.join(found)}: give another directory, or "
            "--overwrite"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a directory")
    out.mkdir(parents=True, exist_ok=True)
    for name in found:
        (out / name).unlink()


def _write(
    out: Path,
    summary: dict[str, Any],
    reference: Trajectory,
    paths: dict[str, Trajectory],
    attributes: dict[str, Any],
) -> None:
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    data = dataset(reference, paths, **attributes)
    # A file cut off in mid-write must not take the place of a whole one.
    data.to_netcdf(out / "result.nc.part", engine="h5netcdf")
    (out / "result.nc.part").replace(out / "result.nc")


def _number(value: Any) -> float | None:
    """A JSON number, or null where there is none."""
    value = float(value)
    return value if math.isfinite(value) else None


def _print(summary: dict[str, Any], out: Path) -> None:
    print(
        "{problem}, {optimizer}, lr {lr:g}, steps {start} + {steps}, {dtype}; "
        "stability threshold {threshold:g}".format(**summary)
    )
    print(f"run: {_cells(summary['run'])}")
    width = max(map(len, COLUMNS.values()))
    names = list(summary["flows"])
    print(" " * width + "".join(f"{name:>14}" for name in names))
    for key, label in COLUMNS.items():
        cells = (summary["flows"][name][key] for name in names)
        print(f"{label:{width}}" + "".join(f"{_cell(cell):>14}" for cell in cells))
    for name in names:
        if (step := summary["flows"][name]["diverged_at"]) is not None:
            print(f"{name} diverged at step {step:g}")
    print(f"written to {out}: {', '.join(FILES)}")


def _cells(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {_cell(value)}" for key, value in row.items()
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def main() -> None:
    """Entry point of the command `rodjax`."""
    app()


if __name__ == "__main__":
    main()
