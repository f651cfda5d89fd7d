"""How an optimizer's state divides into parts, found by trying the optimizer out."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, PyTree

from rodjax.optimizer._same import Same

OptimizerFactory = Callable[[Any], optax.GradientTransformation]
Kind = Callable[[tuple[Any, ...], Any], str | None]

#: The parts of a state; see `State`.
PARTS = ("phase", "slow", "clock", "rest")
# A hyperparameter to try an optimizer with, whatever it is: lr, decay or epsilon.
NOMINAL = 0.1
# Steps of the trial; and of a longer one, where parameters stay that were pushed.
STEPS, LONGER, LONGEST = 3, 24, 130
# An answer to -g that is so far from that to g, relative to it, is another one.
APART = 1e-3

Shapes = tuple[jax.tree_util.PyTreeDef, tuple[jax.ShapeDtypeStruct, ...]]
Trail = list[list[np.ndarray]]


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


def update_with(
    optimizer: optax.GradientTransformation,
    grad: PyTree,
    state: PyTree,
    params: PyTree,
    value: Any,
    value_fn: Callable[[PyTree], Any],
) -> tuple[PyTree, PyTree]:
    """`optimizer.update`, given what it takes of Optax's extra arguments."""
    extra = {"value": value, "grad": grad, "value_fn": value_fn}
    taken = inspect.signature(optimizer.update).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken):
        names = {p.name for p in taken}
        extra = {name: x for name, x in extra.items() if name in names}
    return optimizer.update(grad, state, params, **extra)


def split_of(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, kind: Kind | None
) -> Split:
    """How the state of `factory(lr)` divides on such parameters; of shapes alone."""
    return _split(Same((factory, kind)), _shapes(params), _shapes(lr))


@functools.lru_cache(maxsize=512)
def _split(same: Same, params: Shapes, lr: Shapes) -> Split:
    factory, kind = same.thing
    shapes = jax.eval_shape(
        lambda p, lr: (p, factory(lr).init(p)), _tree(params), _tree(lr)
    )
    leaves = tree_leaves_with_path(shapes)
    count = len(params[1])
    # On numbers, since what is traced cannot be looked into.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        rates = _filled(_tree(lr), NOMINAL)
        try:
            trial = _Trial(factory(rates), _filled(_small(_tree(params)), 0.0))
            if not _alike(trial.start, shapes):
                trial = _Trial(factory(rates), _filled(_tree(params), 0.0))
            kinds, opaque = trial.kinds(count), trial.opaque(count)
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
        reasons += _fraction(factory, _tree(params), _tree(lr), tuple(parts))
    return Split(tuple(parts), dtypes, reasons[0] if reasons else None, opaque)


class _Trial:
    """A few steps of an optimizer from rest, with made-up gradients."""

    def __init__(self, optimizer: optax.GradientTransformation, params: PyTree):
        self.optimizer = optimizer
        self.params = params
        self.compiled_step = jax.jit(self.step)
        self.period: int | None = None
        self.turns = False
        self.start = jax.tree.map(jnp.asarray, (params, self.optimizer.init(params)))

    def step(self, whole: PyTree, grad: PyTree, value: float = 1.0) -> PyTree:
        params, state = whole
        value_fn = lambda w: value + optax.tree.vdot(grad, w)
        updates, new = update_with(
            self.optimizer, grad, state, params, value_fn(params), value_fn
        )
        like = lambda x, y: jnp.astype(x, y.dtype)
        return optax.apply_updates(params, updates), jax.tree.map(like, new, state)

    def branches(self) -> bool:
        """Whether a step has loops or branches, which even by itself compile."""
        names = str(jax.make_jaxpr(self.step)(self.start, self.params))
        return any(f" {name}[" in names for name in ("while", "scan", "cond"))

    def opaque(self, count: int) -> str | None:
        """Why a gradient alone does not tell what the next step is, if so."""
        if self.period:
            return f"moves some parameters only every {self.period} steps"
        if self.turns:
            return "takes different steps in turn"
        (grad,) = self.gradients(0, 1)
        # So small that a cap on a step from the loss does not hide it.
        one, other = (_numbers(self.step(self.start, grad, v)) for v in (1e-3, 2e-3))
        pairs = zip(one[:count], other[:count], strict=True)
        if all(np.allclose(x, y, rtol=APART, atol=0) for x, y in pairs):
            return None
        return "depends on the value of the loss and not on its gradient alone"

    def run(self, gradients: list[PyTree]) -> Trail:
        """The numbers of the state after every step."""
        whole, trail = self.start, []
        # Compiling pays for itself over many steps, and where it is done in any case.
        quick = len(gradients) <= STEPS and not self.branches()
        step = self.step if quick else self.compiled_step
        for grad in gradients:
            whole = step(whole, grad)
            trail.append(_numbers(whole))
        return trail

    def gradients(self, seed: int, steps: int = STEPS) -> list[PyTree]:
        rng = np.random.default_rng(seed)
        draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        return [jax.tree.map(draw, self.params) for _ in range(steps)]

    def kinds(self, count: int) -> list[tuple[str, str | None]]:
        """Of each leaf its part, and why a flow cannot carry it, if so."""
        gradients = self.gradients(0)
        opposite = [jax.tree.map(jnp.negative, g) for g in gradients]
        trails = [self.run(g) for g in (gradients, opposite, self.gradients(1))]
        start = _numbers(self.start)
        columns = [
            [np.stack([step[i] for step in trail]) for trail in trails]
            for i in range(len(start))
        ]
        kinds = [
            _kind(zero, leaf, *column)
            for zero, leaf, column in zip(
                start, jax.tree.leaves(self.start), columns, strict=True
            )
        ]
        leaves = jax.tree.leaves(self.start)
        for leaf, (part, _), (plus, *_) in zip(leaves, kinds, columns, strict=True):
            whole = jnp.issubdtype(leaf.dtype, jnp.integer)
            self.turns |= part == "rest" and whole and np.any(plus[-1] != plus[-2])
        pairs = zip(columns, start, strict=True)
        moves = [np.diff(c[0], axis=0, prepend=z[None]) for c, z in pairs]
        still = [
            bool(m[0].size) and not all(np.any(step) for step in m)
            for m in moves[:count]
        ]
        if any(still):
            steps = LONGEST if all(still) else LONGER
            self.period = _period(start, self.run(self.gradients(0, steps)), count)
            if self.period:
                kinds[0] = (
                    "phase",
                    f"leaves out up to {self.period - 1} steps in a row, and a flow "
                    "models every step by itself: where gradients are accumulated, "
                    "give the optimizer inside, for on a full batch they are one",
                )
        return kinds


def _kind(
    zero: np.ndarray,
    leaf: Array,
    plus: np.ndarray,
    minus: np.ndarray,
    other: np.ndarray,
) -> tuple[str, str | None]:
    """What a leaf's answers to g, -g and another gradient make it."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        scalar = jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.shape == ()
        counted = zero + np.arange(1.0, len(plus) + 1.0) if scalar else None
        if scalar and np.array_equal(plus, counted):
            return "clock", None
        fixed = all(np.array_equal(x, zero) for x in plus)
        reason = (
            f"of dtype {leaf.dtype} and shape {leaf.shape} changes from step to step, "
            "and no step counter does so: a flow can only carry it as it is"
        )
        return "rest", None if fixed else reason
    if not all(np.isfinite(x).all() for x in (zero, plus, minus, other)):
        return "phase", "is not finite from the first steps on, and a flow's must be"
    changes = [x - zero for x in (plus, minus, other)]
    size = max(float(np.abs(x).max(initial=0.0)) for x in changes)
    same = lambda x, y: float(np.abs(x - y).max(initial=0.0)) <= APART * size
    if same(plus, other) and same(plus, minus):
        return "rest", None
    if same(changes[0], -changes[1]):
        return "phase", None
    if same(plus, minus):
        return "slow", None
    return "phase", (
        "neither changes its sign with the gradient, as a first moment does, nor "
        "ignores it, as a second moment does. Say by dynamics(..., kind=...) which of "
        "the two it is to be"
    )


def _period(start: list[np.ndarray], trail: Trail, count: int) -> int | None:
    """Steps from one that moves parameters to the next, with still ones between."""
    for i in range(count):
        path = np.stack([start[i], *(step[i] for step in trail)])
        moved = np.flatnonzero([np.any(d) for d in np.diff(path, axis=0)])
        gaps = np.diff(moved)
        if len(gaps) and gaps.max() > 1:
            return int(gaps.max())
    return None


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


def _shapes(tree: PyTree) -> Shapes:
    leaves, structure = jax.tree.flatten(tree)
    of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return structure, tuple(map(of, leaves))


def _tree(shapes: Shapes) -> PyTree:
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


def _numbers(tree: PyTree) -> list[np.ndarray]:
    """The leaves as numbers that can be subtracted."""

    def number(x: Array) -> np.ndarray:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).astype(np.float64)

    return [number(x) for x in jax.tree.leaves(tree)]
