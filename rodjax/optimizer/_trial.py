"""A few steps of an optimizer with made-up gradients, to see what its state is."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

# Steps of the trial; and of a longer one, where parameters stay that were pushed.
STEPS, LONGER, LONGEST = 3, 24, 130
# An answer to -g that is so far from that to g, relative to it, is another one.
APART = 1e-3

Trail = list[list[np.ndarray]]


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


class Findings(NamedTuple):
    """What a trial has found out.

    - `kinds`: of each leaf its part, and why a flow cannot carry it, if so.
    - `opaque`: why a gradient alone does not tell what the next step is, if so.
    """

    kinds: list[tuple[str, str | None]]
    opaque: str | None


class Trial:
    """A few steps of an optimizer from rest, with made-up gradients."""

    def __init__(self, optimizer: optax.GradientTransformation, params: PyTree):
        self.optimizer = optimizer
        self.params = params
        self.compiled_step = jax.jit(self.step)
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

    def look(self, count: int) -> Findings:
        """What is found out about a state whose first `count` leaves are parameters."""
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
        leaves, turns = jax.tree.leaves(self.start), False
        for leaf, (part, _), (plus, *_) in zip(leaves, kinds, columns, strict=True):
            whole = jnp.issubdtype(leaf.dtype, jnp.integer)
            turns |= part == "rest" and whole and bool(np.any(plus[-1] != plus[-2]))
        pairs = zip(columns, start, strict=True)
        moves = [np.diff(c[0], axis=0, prepend=z[None]) for c, z in pairs]
        still = [
            bool(m[0].size) and not all(np.any(step) for step in m)
            for m in moves[:count]
        ]
        period = None
        if any(still):
            steps = LONGEST if all(still) else LONGER
            period = _period(start, self.run(self.gradients(0, steps)), count)
        if period:
            kinds[0] = (
                "phase",
                f"leaves out up to {period - 1} steps in a row, and a flow models "
                "every step by itself: where gradients are accumulated, give the "
                "optimizer inside, for on a full batch they are one",
            )
            return Findings(kinds, f"moves some parameters only every {period} steps")
        if turns:
            return Findings(kinds, "takes different steps in turn")
        return Findings(kinds, self.opaque(count))

    def opaque(self, count: int) -> str | None:
        """Why one step follows from more than its gradient, if it does."""
        (grad,) = self.gradients(0, 1)
        # So small that a cap on a step from the loss does not hide it.
        one, other = (_numbers(self.step(self.start, grad, v)) for v in (1e-3, 2e-3))
        pairs = zip(one[:count], other[:count], strict=True)
        if all(np.allclose(x, y, rtol=APART, atol=0) for x, y in pairs):
            return None
        return "depends on the value of the loss and not on its gradient alone"


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
        if scalar and np.array_equal(plus - zero, 1 + np.arange(len(plus))):
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


def _numbers(tree: PyTree) -> list[np.ndarray]:
    """The leaves as numbers that can be subtracted."""

    def number(x: Array) -> np.ndarray:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).astype(np.float64)

    return [number(x) for x in jax.tree.leaves(tree)]
