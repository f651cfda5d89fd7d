"""Whether a user's problem can be run, found out before anything is computed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from rodjax.cli._own_module import blaming
from rodjax.problems import Problem
from rodjax.solve import COMPARED, FLOW, LOSSES, STEP

#: What a parameter may be, arrays first.
ARRAYS = jax.Array, np.ndarray, np.generic, float, int, complex
#: What the commands record themselves, or call something else.
TAKEN = {*LOSSES, *COMPARED, FLOW, STEP, "lr", "sharpness_ratio", "residual"}


def checked(problem: Problem, root: Path) -> Problem:
    """The problem, its parameters as arrays.

    **Raises** `ValueError`, in one line, for a loss that is not a function of the
    parameters to a float, parameters that are not floats, starts that are drawn
    otherwise than the parameters are, and metrics that cannot be recorded.
    """
    params = _arrays(problem.params)
    loss = _number("its loss", problem.loss, params, root)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"its loss returns {loss.dtype}, where a real float is wanted")
    if not isinstance(problem.metrics, Mapping):
        raise ValueError(
            f"its metrics are {named(problem.metrics)}, where a dict of functions of "
            "the parameters is wanted"
        )
    for name, metric in problem.metrics.items():
        if not isinstance(name, str) or name in TAKEN or "/" in name:
            raise ValueError(
                f"its metric {name!r} has the name of what is recorded anyway, or one "
                "that a file cannot have: call it something else"
            )
        _number(f"its metric {name!r}", metric, params, root)
    if problem.draw is not None:
        _check_drawn(problem.draw, params, root)
    return problem._replace(params=params)


def named(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "None"
    if type(value) is tuple and value:
        return f"a tuple of {' and '.join(map(_kind, value))}"
    return f"of type {_kind(value)}"


def _kind(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return "array"
    # Compiled or not.
    plain = callable(value) and hasattr(value, "__name__")
    return "function" if plain else type(value).__name__


def _arrays(params: PyTree) -> PyTree:
    leaves = tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("its parameters are empty: there is nothing to optimize")
    for path, leaf in leaves:
        where = f"its parameters{keystr(path)}"
        if not isinstance(leaf, ARRAYS):
            raise ValueError(
                f"{where} are {named(leaf)}, where arrays of floats are wanted: keep "
                "what is not trained in the loss (equinox.partition, nnx.split)"
            )
        # JAX itself knows no dtype of text and objects.
        dtype = leaf.dtype if isinstance(leaf, ARRAYS[:3]) else np.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where} have dtype {dtype}, where real floats are wanted: keep other "
                "data in the loss"
            )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)


def _number(
    what: str, function: Callable[[PyTree], Any], params: PyTree, root: Path
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what a function of the parameters returns: a scalar."""
    if not callable(function):
        raise ValueError(f"{what} is {named(function)}, where a function is wanted")
    with blaming(f"{what} fails at its parameters", root):
        found = jax.eval_shape(function, params)
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise ValueError(f"{what} returns {named(found)}, where a scalar is wanted")
    if found.shape:
        raise ValueError(
            f"{what} returns an array of shape {found.shape}, where a scalar is "
            "wanted: average over the samples"
        )
    return found


def _check_drawn(draw: Callable[[Any], PyTree], params: PyTree, root: Path) -> None:
    if not callable(draw):
        raise ValueError(f"its draw is {named(draw)}, where a function is wanted")
    with blaming("its draw fails", root):
        drawn = jax.eval_shape(draw, jax.random.key(0))
    shape = lambda x: (jnp.shape(x), jnp.result_type(x))
    other = jax.tree.structure(drawn) != jax.tree.structure(params)
    if other or jax.tree.leaves(jax.tree.map(shape, drawn)) != jax.tree.leaves(
        jax.tree.map(shape, params)
    ):
        raise ValueError(
            "its draw gives parameters of another structure, shape or dtype than its "
            "own parameters"
        )
