"""What the command line can name: problems, optimizers, flows, solvers."""

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import optax

from rodjax import problems, transforms
from rodjax.flows import REGISTRY, Floor, Flow, Record
from rodjax.optimizer import Dynamics, OptimizerFactory


class Choice(NamedTuple):
    """What a name stands for: its constructor, and a line that says what it is."""

    build: Callable[..., Any]
    line: str


def _fit(
    network: Callable[..., problems.Problem],
    data: Callable[..., problems.Data],
    line: str,
) -> Choice:
    """A network on data, each of which takes the settings that it knows."""
    given = {k: p for k, p in _parameters(data).items() if k != "dtype"}
    own = {k: p for k, p in _parameters(network).items() if k not in ("data", *given)}

    def build(*, dtype: Any, **settings: Any) -> problems.Problem:
        of_data = {name: settings.pop(name) for name in given if name in settings}
        return network(data(dtype=dtype, **of_data), **settings)

    # For whoever looks up what it takes.
    named = [*given.values(), *own.values(), _parameters(data)["dtype"]]
    keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in named]
    build.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return Choice(build, line)


def _parameters(build: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(build).parameters


_digits = partial(problems.digits, n=100)
_mnist1d = partial(problems.mnist1d, n=100)
_clusters = partial(problems.clusters, n=100)

PROBLEMS: Mapping[str, Choice] = {
    "digits-mlp": Choice(
        problems.digits_mlp, "the reference problem: an MLP on scikit-learn's digits"
    ),
    "digits-cnn": _fit(problems.cnn, _digits, "two convolutions on the digits"),
    "digits-vit": _fit(problems.vit, _digits, "a vision transformer on the digits"),
    "mnist1d-mlp": _fit(problems.mlp, _mnist1d, "an MLP on the signals of MNIST-1D"),
    "mnist1d-cnn": _fit(problems.cnn, _mnist1d, "two convolutions on them"),
    "clusters-mlp": _fit(problems.mlp, _clusters, "an MLP on synthetic clusters"),
    "cifar10-mlp": _fit(
        problems.mlp, problems.cifar10, "an MLP on CIFAR-10, read from your path"
    ),
    "cifar10-cnn": _fit(
        problems.cnn, problems.cifar10, "convolutions on CIFAR-10, from your path"
    ),
    "cifar10-vit": _fit(
        problems.vit, problems.cifar10, "a vision transformer on CIFAR-10, likewise"
    ),
    "sorting": Choice(problems.sorting, "a transformer that learns to sort"),
    "quadratic": Choice(
        partial(problems.quadratic, (1.0, 0.3, 0.1, 0.03), seed=0),
        "a quadratic with a given spectrum",
    ),
    "quartic-well": Choice(
        partial(problems.quartic_well, initial=0.1),
        "one parameter that oscillates at the edge for ever",
    ),
    "berthier": Choice(problems.berthier, "progressive sharpening in two parameters"),
    "berthier-circle": Choice(
        problems.berthier_circle, "three parameters that go on along a circular edge"
    ),
    "berthier-matrix": Choice(
        problems.berthier_matrix, "five parameters, two eigenvalues at the edge"
    ),
    "factorization": Choice(
        partial(problems.factorization, (4, 4, 4), (2.0, 1.0, 0.5, 0.2)),
        "a deep linear network of known singular values",
    ),
    "banana": Choice(problems.banana, "a curved valley"),
    "cosine": Choice(problems.cosine, "one parameter on a cosine"),
    "scalar-factorization": Choice(
        problems.scalar_factorization, "a number as a product of two"
    ),
}

# The nine optimizers of the rod-flow papers; any other name is looked up in Optax.
OPTIMIZERS: Mapping[str, Choice] = {
    "gd": Choice(optax.sgd, "gradient descent"),
    "heavy-ball": Choice(
        partial(optax.sgd, momentum=0.9), "gradient descent with momentum"
    ),
    "nesterov": Choice(
        partial(optax.sgd, momentum=0.9, nesterov=True), "with Nesterov's momentum"
    ),
    "rmsprop": Choice(optax.rmsprop, "gradients over their root mean square"),
    "scalar-rmsprop": Choice(
        transforms.scalar_rmsprop, "RMSProp with one second moment for all"
    ),
    "adam": Choice(optax.adam, "RMSProp with momentum and bias correction"),
    "scalar-adam": Choice(
        transforms.scalar_adam, "Adam with one second moment for all"
    ),
    "nadam": Choice(optax.nadam, "Adam with Nesterov's momentum"),
    "scalar-nadam": Choice(
        transforms.scalar_nadam, "NAdam with one second moment for all"
    ),
}

#: Name on the command line -> record of every flow.
FLOWS: Mapping[str, Record] = {
    name.replace("_", "-"): record for name, record in REGISTRY.items()
}
# Up to this many parameters the principal flow is the exact one, unless given a rank.
EXACT = 32
# Its directions beyond.
DIRECTIONS = 3


def problem(
    name: str, dtype: Any, settings: Mapping[str, Any] | None = None
) -> problems.Problem:
    """The named problem.

    **Raises** `ValueError` for an unknown name, for a setting that its constructor does
    not take, and for one that it needs and is not given.
    """
    settings = settings or {}
    if name not in PROBLEMS:
        raise ValueError(f"--problem {name}: choose from {', '.join(PROBLEMS)}")
    build = PROBLEMS[name].build
    known = {k: p for k, p in _parameters(build).items() if k != "dtype"}
    _check_known(name, "--problem-set", settings, known)
    for parameter, described in known.items():
        if described.default is inspect.Parameter.empty and parameter not in settings:
            raise ValueError(f"--problem {name}: give it --problem-set {parameter}=...")
    try:
        return build(dtype=dtype, **settings)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise ValueError(
            f"--problem-set: {name} cannot be built of {given}: {error}"
        ) from None


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


def hyperparameter(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE of --set: a number, True, False, None, or the name of a type."""
    name, value = setting(text, "--set", "b2=0.99")
    if isinstance(value, str) and not name.endswith("dtype"):
        raise ValueError(
            f"--set {text}: {value!r} is no number, nor True, False or None (one "
            "NAME=VALUE to each --set)"
        )
    return name, value


def setting(text: str, flag: str, example: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, the value a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise ValueError(f"{flag} {text}: write NAME=VALUE, such as {example}")
    try:
        return name, ast.literal_eval(value.capitalize() if value.isalpha() else value)
    except (ValueError, SyntaxError):
        return name, value


def flow(
    text: str,
    dynamics: Dynamics,
    *,
    size: int,
    rank: int | None = None,
    floor: Floor = None,
) -> Flow:
    """The flow of `dynamics` that NAME or NAME:RANK stands for.

    `size` is that of the problem: the principal flow is exact where it is small. `rank`
    is that of every flow which has one and no RANK of its own, each flow's default if
    `None`. `floor` is that of the flows which have one.

    **Raises** `ValueError` for an unknown name, and for a RANK that is no number or is
    given to a flow without one.
    """
    name, colon, own = text.partition(":")
    if name not in FLOWS:
        raise ValueError(f"--flows {text}: choose from {', '.join(FLOWS)}")
    record, options = FLOWS[name], {}
    if colon and not (record.rank and own.isdigit()):
        ranked = ", ".join(name for name, record in FLOWS.items() if record.rank)
        raise ValueError(f"--flows {text}: write NAME:RANK for one of {ranked}")
    chosen = int(own) if colon else rank
    if name == "principal" and chosen is None and size > EXACT:
        chosen = DIRECTIONS
    if record.rank and chosen is not None:
        options["rank"] = chosen
    if record.floor:
        options["floor"] = floor
    return record.build(dynamics, **options)


def solver(name: str) -> diffrax.AbstractSolver:
    """The diffrax solver of this name, in any case."""
    found = {
        known.lower(): value
        for known, value in vars(diffrax).items()
        if inspect.isclass(value)
        and issubclass(value, diffrax.AbstractSolver)
        and not issubclass(value, diffrax.AbstractImplicitSolver)
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
    build: Any = OPTIMIZERS[name].build if name in OPTIMIZERS else None
    if build is None:
        build = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    function = getattr(build, "func", build)
    if not inspect.isroutine(function) or "learning_rate" not in _parameters(build):
        raise ValueError(
            f"--optimizer {name}: choose from {', '.join(OPTIMIZERS)}, or name an "
            "optimizer of Optax that takes a learning_rate"
        )
    _check_known(name, flag, given, set(_parameters(build)) - {"learning_rate"})
    return build


def _check_known(
    name: str, flag: str, given: Iterable[str], known: Iterable[str]
) -> None:
    """Raise `ValueError` for what `flag` gives and `name` does not take."""
    for parameter in given:
        if parameter not in known:
            raise ValueError(
                f"{flag} {parameter}=...: {name} takes {', '.join(sorted(known))}"
            )
