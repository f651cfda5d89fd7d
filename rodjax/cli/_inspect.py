"""`rodjax inspect`: where the checkpoints of a training loop stand, and what comes."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from rodjax import training
from rodjax.cli import _axes as axes
from rodjax.cli import _names as choices
from rodjax.cli import _shared as shared
from rodjax.cli._shared import cell, number
from rodjax.optimizer import dynamics as make_dynamics
from rodjax.optimizer import fitted
from rodjax.report import plot_checkpoints, plot_forecast

if TYPE_CHECKING:
    import xarray

COLUMNS = {
    "loss": "loss",
    "sharpness_ratio": "S/threshold",
    "sharpness_ratio_residual": "residual",
    "realized_edge": "zeta",
    "step_curvature": "step curvature",
    "update_ratio": "update/params",
}
FILES = ("summary.json", "result.nc", "plot.png")
FORECAST = ("forecast.nc", "forecast.png")
#: Learning rates of a forecast, if none are given, over that of the run.
AROUND = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def inspect(
    directory: Annotated[Path, typer.Argument(help="Of orbax checkpoints.")],
    problem: shared.ProblemName = "digits-mlp",
    problem_settings: shared.ProblemSettings = None,
    optimizer: shared.OptimizerName = "gd",
    settings: shared.Settings = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the run.")] = 0.6,
    params: Annotated[
        str,
        typer.Option(help="Where the parameters are in a checkpoint: a dotted name."),
    ] = "params",
    opt_state: Annotated[
        str, typer.Option(help="Dotted name of the optimizer's state in it.")
    ] = "opt_state",
    products: Annotated[
        int, typer.Option(help="Hessian-vector products for each checkpoint.")
    ] = 30,
    forecast: Annotated[
        int | None, typer.Option(help="Steps to forecast from the last one on.")
    ] = None,
    lrs: Annotated[
        str | None,
        typer.Option(
            help="Learning rates of the forecast, as --lr of rodjax sweep.",
            show_default="a quarter to four times --lr",
        ),
    ] = None,
    flows: shared.FlowNames = "stable,modulated",
    runs: Annotated[
        bool, typer.Option("--runs", help="Run the optimizer beside the forecast.")
    ] = False,
    float64: Annotated[
        bool, typer.Option("--float64/--float32", help="Precision.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory written to.")] = Path(
        "rodjax-inspect"
    ),
    overwrite: Annotated[bool, typer.Option(help="Replace earlier files.")] = False,
) -> None:
    """Say where each checkpoint of a training run stands, and forecast what comes.

    The problem's loss is full batch: a fixed set of samples that the run is looked at
    by, whatever batches it was trained on.
    """
    dtype = shared.configure(float64)
    with shared.refusing("inspect"):
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"--lr {lr}: it must be positive and finite")
        for flag, value in (("--products", products), ("--forecast", forecast)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value}: it must be at least 1")
        if forecast is None and (lrs is not None or runs):
            raise ValueError("--lrs and --runs want a forecast: give --forecast STEPS")
        rates = _rates(lr, lrs)
        chosen = shared.problem(problem, dtype, problem_settings)
        hyperparameters = dict(map(choices.hyperparameter, settings or []))
        build = shared.optimizer(optimizer, hyperparameters)
        dynamics = make_dynamics(build, chosen.loss)
        models = shared.build_flows(
            shared.flow_names(flows), dynamics, chosen, rank=None
        )
        files = FILES if forecast is None else FILES + FORECAST
        shared.prepare(out, files, overwrite)
        last: list[training.Checkpoint] = []
        saved = training.checkpoints(directory, pick=_picker(params, opt_state))
        looks = training.inspect(
            build(lr), chosen.loss, chosen.params, _last(saved, last), products=products
        )
        head: dict[str, Any] = {
            "directory": str(directory),
            "problem": chosen.name,
            "optimizer": optimizer,
            "problem_settings": json.dumps(problem_settings or []),
            "settings": json.dumps(hyperparameters),
            "lr": lr,
            "dtype": shared.precision(chosen),
        }
        title = f"{chosen.name}, {optimizer}, lr {lr:g}"
        rows: list[dict[str, Any]] = []
        for look in looks:
            if not rows:
                # Not before the first is read, which may be of another model.
                print(f"{title}, {head['dtype']}; checkpoints in {directory}")
                titles = "".join(f"{text:>15}" for text in COLUMNS.values())
                print(f"{'step':>9}{titles}  status")
            rows.append(look)
            print(_line(look), flush=True)
        data = _dataset(rows, head)
        data.to_netcdf(out / FILES[1], engine="h5netcdf")
        plot_checkpoints(data, title).savefig(out / FILES[2], dpi=120)
        summary: dict[str, Any] = head | {"checkpoints": [_plain(row) for row in rows]}
        _write(out, summary)
        if forecast is not None:
            step, weights, state = last[0]
            weights = fitted(weights, chosen.params, f"checkpoint {step}: params")
            start = training.window(dynamics, weights, state, step=step, lr=lr)
            ahead = training.forecast(
                dynamics, start, forecast, lrs=rates, flows=models, runs=runs
            )
            ahead.assign_attrs(head).to_netcdf(out / FORECAST[0], engine="h5netcdf")
            named = f"{title}: {forecast} steps from {step} on"
            plot_forecast(ahead, named).savefig(out / FORECAST[1], dpi=120)
            largest = {str(k): number(v) for k, v in _largest(ahead).items()}
            _write(out, summary | {"forecast": forecast, "largest_lr": largest})
            print()
            print(training.table(ahead))
    shared.written(out, files)


def _rates(lr: float, text: str | None) -> np.ndarray:
    given = lr * np.array(AROUND) if text is None else axes.values("--lrs", text)
    found = np.atleast_1d(given)
    if not np.all((found > 0) & np.isfinite(found)):
        raise ValueError(f"--lrs {text}: learning rates must be positive and finite")
    return found


def _picker(*names: str) -> Callable[[Any], tuple[Any, Any]]:
    """What stands at two dotted names of a saved tree."""

    def at(tree: Any, name: str) -> Any:
        for part in name.split("."):
            if isinstance(tree, list | tuple):
                tree = dict(zip(map(str, range(len(tree))), tree, strict=True))
            if not (isinstance(tree, dict) and part in tree):
                there = ", ".join(map(str, tree)) if isinstance(tree, dict) else "none"
                raise ValueError(
                    f"a checkpoint has nothing at {name}: instead of {part} it has "
                    f"{there}. Say where it is by --params and --opt-state"
                )
            tree = tree[part]
        return tree

    return lambda tree: (at(tree, names[0]), at(tree, names[1]))


def _last(
    saved: Iterator[training.Checkpoint], kept: list[training.Checkpoint]
) -> Iterator[training.Checkpoint]:
    """The same, the latest of them kept."""
    for one in saved:
        kept[:] = [one]
        yield one


def _line(look: dict[str, Any]) -> str:
    cells = (cell(number(look.get(name, math.nan))) for name in COLUMNS)
    status = training.STATUS[int(look["status"])]
    return (
        f"{look['step']:>9}" + "".join(f"{text:>15}" for text in cells) + f"  {status}"
    )


def _dataset(rows: list[dict[str, Any]], head: dict[str, Any]) -> "xarray.Dataset":
    import xarray

    steps = [row["step"] for row in rows]
    names = [name for name in rows[0] if name not in ("step", "probed_at")]
    columns = {name: [float(row[name]) for row in rows] for name in names}
    long = {name: quantity.about for name, quantity in training.QUANTITIES.items()}
    long |= {"loss": "loss", "status": f"index into {', '.join(training.STATUS)}"}
    return xarray.Dataset(
        {
            name: ("step", values, {"long_name": long.get(name, name)})
            for name, values in columns.items()
        },
        coords={"step": ("step", steps, {"long_name": "optimizer steps"})},
        attrs=head | {"status_names": list(training.STATUS)},
    )


def _largest(data: "xarray.Dataset") -> dict[str, float]:
    names = data["flow"].values
    return {name: float(data["largest_lr"].sel(flow=name)) for name in names}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: number(value) for key, value in row.items() if key != "probed_at"}
    return numbers | {"status": training.STATUS[int(row["status"])]}


def _write(out: Path, summary: dict[str, Any]) -> None:
    (out / FILES[0]).write_text(json.dumps(summary, indent=2) + "\n")
