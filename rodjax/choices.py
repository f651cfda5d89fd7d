"""What the command line can name: problems, optimizers, flows, solvers."""

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import diffrax
import optax

from rodjax import flows, problems, transforms
from rodjax.dynamics import Dynamics, OptimizerFactory
from rodjax.eigen import DENSE
from rodjax.flows import Flow
from rodjax.flows.base import Seed

PROBLEMS: Mapping[str, Callable[..., problems.Problem]] = {
    "digits-mlp": problems.digits_mlp,
    "quadratic": partial(problems.quadratic, (1.0, 0.3, 0.1, 0.03), seed=0),
    "quartic-well": partial(problems.quartic_well, start=0.1),
    # Far below the edge the oscillation would die out to exactly zero.
    "berthier": partial(problems.berthier, start=(0.1, 6.5)),
    "factorization": partial(problems.factorization, (4, 4, 4), (2.0, 1.0, 0.5, 0.2)),
    "banana": problems.banana,
    "cosine": problems.cosine,
    "scalar-factorization": problems.scalar_factorization,
}

# The nine optimizers of the rod-flow papers; any other name is looked up in Optax.
OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "heavy-ball": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop,
    "scalar-rmsprop": transforms.scalar_rmsprop,
    "adam": optax.adam,
    "scalar-adam": transforms.scalar_adam,
    "nadam": optax.nadam,
    "scalar-nadam": transforms.scalar_nadam,
}

FLOWS = (
    "stable",
    "rod",
    "modulated",
    "edge",
    "central",
    "gradient",
    "igr",
    "third-order",
    "principal",
    "covariance",
)
#: Flows whose oscillation has a least size.
SEEDED = ("modulated", "edge", "covariance")


def problem(name: str, dtype: Any) -> problems.Problem:
    """The named problem. Raises `ValueError` for an unknown one."""
    if name not in PROBLEMS:
        raise ValueError(f"--problem {name}: choose from {', '.join(PROBLEMS)}")
    return PROBLEMS[name](dtype=dtype)


def optimizer(name: str, settings: Mapping[str, Any]) -> OptimizerFactory:
    """A function from the learning rate to the named Optax optimizer.

    **Raises** `ValueError` for a name that neither the table nor Optax has, and for a
    setting that its constructor does not take.
    """
    build = _constructor(name, "--set", settings)
    return lambda lr: build(learning_rate=lr, **settings)


def optimizer_family(
    name: str, settings: Mapping[str, Any], axes: Sequence[str]
) -> OptimizerFactory:
    """A function from the hyperparameters of a sweep to the named Optax optimizer.

    It takes a dict of `lr`, of the other `axes`, which the optimizer's constructor has
    too, and of what else the grid has.

    **Raises** `ValueError` as `optimizer` does, and for an axis that the constructor
    does not take or that `settings` fix.
    """
    build = _constructor(name, "--set", settings)
    _constructor(name, "--axis", axes)
    for axis in axes:
        if axis in settings:
            raise ValueError(f"--axis {axis}=...: --set fixes {axis}, give one of them")

    def family(h: Mapping[str, Any]) -> optax.GradientTransformation:
        return build(learning_rate=h["lr"], **{a: h[a] for a in axes}, **settings)

    return family


def setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, the value a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise ValueError(f"--set {text}: write NAME=VALUE, such as b2=0.99")
    try:
        return name, ast.literal_eval(value.capitalize() if value.isalpha() else value)
    except (ValueError, SyntaxError):
        return name, value


def flow(
    name: str,
    dynamics: Dynamics,
    *,
    size: int,
    rank: int,
    top: int,
    seed: Seed = None,
) -> Flow:
    """The named flow of `dynamics`, for a problem of `size` parameters.

    `rank` is that of the rod, `top` the directions of the central, covariance and
    principal flow; the last is exact where the whole Hessian is small. `seed` is that
    of the flows in `SEEDED`.
    """
    if name not in FLOWS:
        raise ValueError(f"--flows {name}: choose from {', '.join(FLOWS)}")
    options: dict[str, Any] = {
        "rod": {"rank": rank},
        "central": {"top": top},
        "covariance": {"rank": top},
        "principal": {"top": None if size <= DENSE else top},
    }.get(name, {})
    if name in SEEDED:
        options["seed"] = seed
    return getattr(flows, name.replace("-", "_"))(dynamics, **options)


def solver(name: str) -> diffrax.AbstractSolver:
    """The diffrax solver of this name, in any case."""
    found = {
        known.lower(): value
        for known, value in vars(diffrax).items()
        if inspect.isclass(value)
        and issubclass(value, diffrax.AbstractSolver)
        and not inspect.isabstract(value)
    }
    try:
        return found[name.lower()]()
    except (KeyError, TypeError):
        raise ValueError(
            f"--solver {name}: name an explicit diffrax solver, such as heun, euler, "
            "midpoint or tsit5"
        ) from None


def _constructor(name: str, flag: str, given: Iterable[str]) -> Any:
    """The named optimizer's, which must take what `flag` has given."""
    build: Any = OPTIMIZERS.get(name)
    if build is None:
        build = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    function = getattr(build, "func", build)
    if not inspect.isroutine(function) or "learning_rate" not in _parameters(build):
        raise ValueError(
            f"--optimizer {name}: choose from {', '.join(OPTIMIZERS)}, or name an "
            "optimizer of Optax that takes a learning_rate"
        )
    known = _parameters(build) - {"learning_rate"}
    for parameter in given:
        if parameter not in known:
            raise ValueError(
                f"{flag} {parameter}=...: {name} takes {', '.join(sorted(known))}"
            )
    return build


def _parameters(build: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(build).parameters)
