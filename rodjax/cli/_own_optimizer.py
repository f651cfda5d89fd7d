"""The user's own optimizer, by the file or the module that it is in."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rodjax.cli._own import find
from rodjax.cli._own_checks import named
from rodjax.cli._own_module import blaming
from rodjax.optimizer import OptimizerFactory

WANTED = "an optax.GradientTransformation"
# Some schedules of Optax compare their peak with zero, in Python.
WAY_OUT = " (multiply a schedule whose peak is one by the learning rate)"


def load_optimizer(spec: str, settings: Mapping[str, Any]) -> OptimizerFactory:
    """The function from a learning rate that FILE.py:NAME or package.module:NAME is.

    It takes the learning rate first, whatever it does with it (the peak of a schedule,
    the rate of one of several groups), and `settings` by name.

    **Raises** `ValueError`, in one line that names the option or the user's line, if
    it is no such function.
    """
    try:
        source, name, found = find(spec)
        if isinstance(found, optax.GradientTransformation) or not callable(found):
            raise ValueError(
                f"{name} is {named(found)}, where a function from the learning rate to "
                f"{WANTED} is wanted: def {name}(lr): return ..."
            )
        build: Callable[..., Any] = found
        _check_takes(name, build, settings)
        with blaming(f"{name} fails", source.root):
            made = build(0.1, **settings)
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(f"{name} returns {named(made)}, where {WANTED} is wanted")
        with blaming(
            f"{name} fails with its learning rate as data{WAY_OUT}", source.root
        ):
            jax.eval_shape(lambda lr: build(lr, **settings).init(jnp.zeros(1)), 0.1)
    except ValueError as error:
        raise ValueError(f"--optimizer {spec}: {error}") from None
    return lambda lr: build(lr, **settings)


def _check_takes(name: str, build: Any, settings: Mapping[str, Any]) -> None:
    try:
        inspect.signature(build).bind(0.1, **settings)
    except TypeError as error:
        raise ValueError(
            f"{name} cannot be called with a learning rate and --set {dict(settings)}: "
            f"{error}"
        ) from None
