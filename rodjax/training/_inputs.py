"""What a training loop hands to `watch`, and what of it each quantity needs."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import tree_leaves_with_path
from jaxtyping import PyTree

from rodjax.optimizer import Loss
from rodjax.training._quantities import QUANTITIES

# Not meant for a loss that names them, but for a line search.
RESERVED = frozenset({"value", "grad", "value_fn", "probe_fn"})
# Under which Flax's variables keep their arrays.
INSIDE = ("value", "raw_value")

Groups = dict[str, list[int]]


class Given(NamedTuple):
    """The inputs of one step.

    - `params`, `grad`: before it, and the gradient there of the batch's loss.
    - `value`, `batch`: this loss, and as a function of the parameters; or `None`.
    - `probe`: the loss of a fixed set; or `None`.
    """

    params: PyTree
    grad: PyTree
    value: Any
    batch: Loss | None
    probe: Loss | None


def given_to(
    updates: PyTree, params: PyTree, extra: dict[str, Any], probe_fn: Loss | None
) -> Given:
    """The inputs, from the arguments of `update`."""
    function = lambda name: _of_params(extra.get(name), extra)
    grad = extra.get("grad")
    return Given(
        params,
        updates if grad is None else grad,
        extra.get("value"),
        function("value_fn"),
        function("probe_fn") or _of_params(probe_fn, extra),
    )


def _of_params(
    function: Callable[..., Any] | None, extra: dict[str, Any]
) -> Loss | None:
    """As a function of the parameters alone, as Optax's line searches take it."""
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)[1:]
    taken = {k: v for k, v in extra.items() if k in names and k not in RESERVED}
    return lambda w: function(w, **taken)


def taken_by(
    optimizer: optax.GradientTransformation, extra: dict[str, Any]
) -> dict[str, Any]:
    """Of the extra arguments those that the optimizer takes."""
    parameters = inspect.signature(optimizer.update).parameters
    kinds = {p.kind for p in parameters.values()}
    # One that takes all of them may refuse what its line search does not know.
    every = inspect.Parameter.VAR_KEYWORD in kinds
    passed = lambda name: name in parameters or (every and name != "probe_fn")
    return {name: x for name, x in extra.items() if passed(name)}


def served(
    names: Iterable[str], given: Given, full_batch: bool, by_name: bool
) -> frozenset[str]:
    """Of the quantities those whose input is given.

    **Raises** `ValueError` with the argument that is missing: for a quantity that was
    asked for by name, or if nothing that looks at a loss is left.
    """
    there = {"value": given.value, "value_fn": given.batch, "probe_fn": given.probe}
    left, missing = set(), {}
    for name in names:
        base = name.partition("/")[0]
        needs = QUANTITIES[base].needs
        if base == "realized_edge" and full_batch:
            needs = ("value",)
        if not needs or any(there[argument] is not None for argument in needs):
            left.add(name)
        else:
            missing[base] = " or ".join(f"{argument}=" for argument in needs)
    blind = missing and not any(QUANTITIES[n.partition("/")[0]].needs for n in left)
    if missing and (by_name or blind):
        name, argument = next(iter(missing.items()))
        ways = "call update(grads, state, params, ...) with it"
        if "probe_fn" in argument:
            ways += ", or give probe_fn= to watch"
        raise ValueError(f"watch needs {argument} for {name}: {ways}")
    return frozenset(left)


def groups_of(params: PyTree, by: Callable[[tuple[Any, ...]], str] | None) -> Groups:
    """Name -> which leaves of the parameters are of this group."""
    groups: Groups = {}
    for i, (path, _) in enumerate(tree_leaves_with_path(params) if by else ()):
        # Variables of Flax are nodes at `init`, and their arrays are leaves later.
        inside = path and getattr(path[-1], "name", None) in INSIDE
        own = path[:-1] if inside else path
        name = by(own) if by else ""
        if not isinstance(name, str):
            raise ValueError(
                f"by must return the name of a group, a string; for "
                f"{jax.tree_util.keystr(own)} it returned {name!r}"
            )
        groups.setdefault(name, []).append(i)
    return dict(sorted(groups.items()))
