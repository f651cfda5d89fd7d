"""What the commands share: options, their checks, numbers as text and as JSON."""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import typer
from jaxtyping import PyTree

from rodjax.cli import _names as choices
from rodjax.cli import _own as own
from rodjax.cli._own_optimizer import load_optimizer
from rodjax.flows import Floor, Flow
from rodjax.optimizer import Dynamics, OptimizerFactory, first_edge
from rodjax.problems import Problem
from rodjax.solve import Metric, edge_of_stability, monitor
from rodjax.sweeps import settings_in

ProblemName = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(choices.PROBLEMS)}; see rodjax list. Or your own, as "
        f"{' or '.join(own.FORMS)}."
    ),
]
ProblemSettings = Annotated[
    list[str] | None,
    typer.Option("--problem-set", help="NAME=VALUE for the problem, such as n=200."),
]
OptimizerName = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(choices.OPTIMIZERS)}, or Optax's name. Or your own "
        f"function of the learning rate, as {' or '.join(own.FORMS)}."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE for the optimizer's constructor."),
]
FlowNames = Annotated[
    str,
    typer.Option(
        help=f"Comma-separated NAME or NAME:RANK, of {', '.join(choices.FLOWS)}."
    ),
]
Steps = Annotated[int, typer.Option(help="Optimizer steps compared.")]
Warmup = Annotated[int, typer.Option(help="Optimizer steps taken before.")]
Rank = Annotated[
    int | None,
    typer.Option(
        help="Directions of every flow that has them and no NAME:RANK of its own.",
        show_default="each flow's own",
    ),
]
Substeps = Annotated[
    int | None, typer.Option(help="Solver steps per step; each flow's own if none.")
]
Solver = Annotated[
    str | None,
    typer.Option(help="An explicit diffrax solver; each flow's own if none."),
]
Float64 = Annotated[bool, typer.Option("--float64/--float32", help="Precision.")]
Every = Annotated[int, typer.Option(help="Save every so many steps.")]


def configure(float64: bool) -> str:
    """Set the precision of this process, which is ours to configure; its dtype."""
    jax.config.update("jax_enable_x64", float64)
    return "float64" if float64 else "float32"


@contextmanager
def refusing(
    command: str, unless: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Print what is wrong with the options and exit; `unless` it is not about them."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        if unless():
            raise
        typer.secho(f"rodjax {command}: {error}", err=True, fg="red")
        raise typer.Exit(2) from None


def problem(name: str, dtype: str, settings: list[str] | None) -> Problem:
    """The named problem, or the user's own, of the settings NAME=VALUE."""
    if own.is_own(name):
        return own.load(name, settings or [], dtype)
    if name not in choices.PROBLEMS:
        raise ValueError(
            f"--problem {name}: choose from {', '.join(choices.PROBLEMS)}, or name "
            f"your own as {' or '.join(own.FORMS)}"
        )
    parse = partial(choices.setting, flag="--problem-set", example="n=200")
    found = choices.problem(name, dtype, dict(map(parse, settings or [])))
    return found._replace(name=name)


def optimizer(name: str, settings: Mapping[str, Any]) -> OptimizerFactory:
    """A function from the learning rate to the named optimizer, or the user's own."""
    find = load_optimizer if own.is_own(name) else choices.optimizer
    return find(name, settings)


def precision(problem: Problem) -> str:
    """The dtype of its parameters, which a user's own problem chooses."""
    return str(jnp.result_type(*jax.tree.leaves(problem.params)))


def metrics(
    dynamics: Dynamics, problem: Problem, *, ratio: bool = True
) -> tuple[Metric, ...]:
    """What the commands record: where the sharpness stands, and the problem's own."""
    own = monitor(problem.metrics)
    return (edge_of_stability(dynamics), own) if ratio else (own,)


def edge(dynamics: Dynamics, problem: Problem, lr: PyTree) -> tuple[float, str, bool]:
    """The stability threshold, infinite if there is none; a remark; and if there is."""
    try:
        reason = dynamics.no_edge(problem.params, lr=lr)
        if reason is not None:
            return math.inf, f"no stability threshold: {reason}", False
        first = first_edge(dynamics, problem.params, lr=lr)
    except ValueError as error:
        if "threshold" not in str(error):
            raise
        return math.inf, f"no stability threshold: {error}", False
    period = 2 * math.pi / float(first.angle)
    remark = (
        f"stability is first lost to an oscillation of period {period:.3g}, and the "
        "flows that oscillate model one of period two"
    )
    return float(first.curvature), remark if period > 2.01 else "", True


def check_steps(warmup: int, steps: int, every: int, substeps: int | None) -> None:
    """Raise `ValueError` for numbers of steps that make no sense."""
    for flag, value, least in (("--warmup", warmup, 0), ("--substeps", substeps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value}: it must be at least {least}")
    if every < 1 or steps < 1 or steps % every:
        raise ValueError(
            f"--steps {steps} must be a positive multiple of --every {every}"
        )


def prepare(out: Path, files: Sequence[str], overwrite: bool) -> None:
    """Make the directory `out`, without these files and fit to be written to.

    **Raises** `ValueError` where it is not, or holds one of them.
    """
    import xarray  # noqa: F401  (to fail before anything is computed, not after it)

    found = [name for name in files if (out / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"--out {out} already holds {', '.join(found)}: give another directory, or "
            "--overwrite"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a directory")
    out.mkdir(parents=True, exist_ok=True)
    trial = out / ".part"
    try:
        trial.touch()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error}") from None
    for path in (trial, *(out / name for name in found)):
        path.unlink()


def check_out(out: Path, files: Sequence[str]) -> None:
    """Refuse a directory that holds results, and not what they were made from."""
    found = [name for name in files if (out / name).exists()]
    if settings_in(out) is None and found:
        raise ValueError(
            f"--out {out} already holds {', '.join(found)}: give another directory"
        )


def flow_names(flows: str) -> list[str]:
    """The names in a comma-separated list; raises `ValueError` if one is repeated."""
    names = [name.strip() for name in flows.split(",") if name.strip()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--flows {flows}: {name} is named twice")
    return names


def build_flows(
    names: list[str],
    dynamics: Dynamics,
    problem: Problem,
    *,
    rank: int | None,
    floor: Floor = None,
) -> dict[str, Flow]:
    """The named flows of `dynamics`.

    **Raises** `ValueError` where a flow does, and for a `rank` that none of them takes.
    """
    size = optax.tree.size(problem.params)
    built = {
        name: choices.flow(name, dynamics, size=size, rank=rank, floor=floor)
        for name in names
    }
    ranked = [name for name, record in choices.FLOWS.items() if record.rank]
    if rank is not None and not set(ranked) & set(names):
        raise ValueError(
            f"--rank {rank}: none of the flows takes it; name one of "
            f"{', '.join(ranked)} in --flows, without a RANK of its own"
        )
    return built


def written(out: Path, files: Sequence[str]) -> None:
    """Say what a command has left, and how to look at it."""
    print(f"written to {out}: {', '.join(files)}")
    print(f"in a browser: rodjax view {shlex.quote(str(out / 'result.nc'))}")


def number(value: Any) -> float | None:
    """A JSON number, or null where there is none."""
    value = float(value)
    return value if math.isfinite(value) else None


def cell(value: float | None) -> str:
    """A number in a table."""
    return "-" if value is None else f"{value:.5g}"
