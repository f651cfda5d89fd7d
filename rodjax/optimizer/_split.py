"""How an optimizer's state divides into parts, found by trying the optimizer out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import PyTree

from rodjax.optimizer._same import Same
from rodjax.optimizer._state import LATE, State
from rodjax.optimizer._trial import Trial, update_with

OptimizerFactory = Callable[[Any], optax.GradientTransformation]
Kind = Callable[[tuple[Any, ...], Any], str | None]

#: The parts of a state; see `State`.
PARTS = ("phase", "slow", "clock", "rest")
# A hyperparameter to try an optimizer with, whatever it is: lr, decay or epsilon.
NOMINAL = 0.1

Shapes = tuple[jax.tree_util.PyTreeDef, tuple[jax.ShapeDtypeStruct, ...]]


class Split(NamedTuple):
    """Where the leaves of `(params, optax_state)` belong, and what they are.

    - `parts`: of each leaf, the name of its part.
    - `dtypes`: of each leaf, as Optax has it.
    - `refusal`: why no flow can carry the state; `None` where one can.
    - `opaque`: why a gradient alone does not tell what the next step is, if so.
    """

    parts: tuple[str, ...]
    dtypes: tuple[Any, ...]
    refusal: str | None
    opaque: str | None


def split_of(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, kind: Kind | None
) -> Split:
    """How the state of `factory(lr)` divides on such parameters; of shapes alone."""
    return _split(Same((factory, kind)), shapes_of(params), shapes_of(lr))


@functools.lru_cache(maxsize=512)
def _split(same: Same, params: Shapes, lr: Shapes) -> Split:
    factory, kind = same.thing
    shapes = jax.eval_shape(
        lambda p, lr: (p, factory(lr).init(p)), tree_of(params), tree_of(lr)
    )
    leaves = tree_leaves_with_path(shapes)
    count = len(params[1])
    # On numbers, since what is traced cannot be looked into.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        try:
            kinds, opaque = trial_of(factory, params, lr).look(count)
        except Exception as error:
            # Its own run will say so, if it does not know better there.
            said = str(error).strip().splitlines()[0]
            reason = f"could not be tried out: {said}"
            float_ = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
            kinds = [("phase" if float_(x) else "rest", reason) for _, x in leaves]
            opaque = None

    parts, reasons = ["phase"] * count, []
    for (path, leaf), (part, reason) in zip(leaves[count:], kinds[count:], strict=True):
        chosen = None if kind is None else kind(path[1:], leaf)
        if chosen not in (None, *PARTS):
            raise ValueError(
                f"kind returned {chosen!r} for {keystr(path[1:])}: it must be "
                f"{', '.join(map(repr, PARTS))} or None"
            )
        parts.append(chosen or part)
        if reason and not chosen:
            reasons.append(f"its state{keystr(path[1:])} {reason}")
    for (path, _), (_, reason) in zip(leaves[:count], kinds, strict=False):
        if reason:
            reasons.append(f"its update of params{keystr(path[1:])} {reason}")
    dtypes = tuple(leaf.dtype for _, leaf in leaves)
    if not reasons and "clock" in parts:
        reasons += _fraction(factory, tree_of(params), tree_of(lr), tuple(parts))
    return Split(tuple(parts), dtypes, reasons[0] if reasons else None, opaque)


def trial_of(factory: OptimizerFactory, params: Shapes, lr: Shapes) -> Trial:
    """A trial on numbers: of parameters at zero, with short axes if they serve."""
    full, rates = tree_of(params), _filled(tree_of(lr), NOMINAL)
    trial = Trial(factory(rates), _filled(_small(full), 0.0))
    whole = jax.eval_shape(lambda p, lr: (p, factory(lr).init(p)), full, tree_of(lr))
    if _alike(trial.start, whole):
        return trial
    return Trial(factory(rates), _filled(full, 0.0))


def settled_trial(
    factory: OptimizerFactory, params: Shapes, lr: Shapes, split: Split, slow: float
) -> tuple[Trial, State]:
    """A trial and its state, with these second moments and counters far on."""
    trial = trial_of(factory, params, lr)
    leaves, structure = jax.tree.flatten(trial.start)
    pairs = list(zip(leaves, split.parts, strict=True))
    only = lambda part: [x if p == part else None for x, p in pairs]
    state = State(*(jax.tree.unflatten(structure, only(part)) for part in PARTS))
    return trial, state._replace(
        slow=optax.tree.full_like(state.slow, slow),
        clock=optax.tree.full_like(state.clock, LATE),
    )


def _fraction(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, parts: tuple[str, ...]
) -> list[str]:
    """Why the optimizer cannot read its counters between two steps, if so."""

    def step(params: PyTree, lr: PyTree):
        whole = (params, factory(lr).init(params))
        leaves, structure = jax.tree.flatten(whole)
        time = lambda x, part: jnp.astype(x, float) if part == "clock" else x
        _, state = jax.tree.unflatten(structure, map(time, leaves, parts))
        value_fn = lambda w: optax.tree.vdot(w, w)
        value = value_fn(params)
        return update_with(factory(lr), params, state, params, value, value_fn)

    try:
        jax.eval_shape(step, params, lr)
    except (TypeError, IndexError) as error:
        said = str(error).strip().splitlines()[0]
        return [
            f"it cannot read its step counter between two steps ({said}): write a "
            "schedule that looks up a table with jnp.interp, or take "
            "jnp.floor(count).astype(int) of the count"
        ]
    return []


def shapes_of(tree: PyTree) -> Shapes:
    leaves, structure = jax.tree.flatten(tree)
    of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return structure, tuple(map(of, leaves))


def tree_of(shapes: Shapes) -> PyTree:
    return jax.tree.unflatten(*shapes)


def _small(params: PyTree) -> PyTree:
    """The same with short axes: they show what long ones do, at no cost."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(_short(x.shape), x.dtype), params
    )


def _short(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(n, 2 + axis % 2) for axis, n in enumerate(shape))


def _alike(small: PyTree, full: PyTree) -> bool:
    """Whether a state is made on short axes as it is on long ones."""
    one, other = jax.tree.leaves(small), jax.tree.leaves(full)
    return jax.tree.structure(small) == jax.tree.structure(full) and all(
        jnp.shape(x) in (y.shape, _short(y.shape))
        for x, y in zip(one, other, strict=True)
    )


def _filled(shapes: PyTree, value: float) -> PyTree:
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
