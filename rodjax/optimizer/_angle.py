"""At which angle an optimizer first loses its stability, seen in a few of its steps."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from rodjax.optimizer._same import Same
from rodjax.optimizer._split import (
    Kind,
    OptimizerFactory,
    Shapes,
    settled_trial,
    shapes_of,
    split_of,
    tree_of,
)
from rodjax.optimizer._state import State, merge, slots_of, split_like
from rodjax.optimizer._trial import Trial

# A gradient whose square moves no second moment that is one.
TINY = 1e-18
# Of a step that the slots of each coordinate by itself may leave unexplained.
APART = 1e-3
# A gradient that nothing clips, and by how much twice as large a one may move by other
# than twice as much, relative to that.
SMALL, BENT = 1e-6, 0.05
NO_LINE = (
    "its steps are not linear in the gradient, each coordinate by itself, as where "
    "they go by its sign, are normalized or orthogonalized"
)
# How near the unit circle, and how far from the real axis, a root is looked for.
NEAR = 1e-3

# Of each leaf an array, or a number where it has no axes.
Numbers = list[Any]


def angle_of(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, kind: Kind | None
) -> float | None:
    """`first_edge(...).angle`, of shapes alone and without compiling a program.

    pi for what remembers nothing. `None` where it is not known so: coordinates have no
    thresholds of their own, no curvature reaches them, or `lr` is more than one number,
    so that its values decide. One number is taken for a learning rate, which scales
    curvature and no more.
    """
    found = _angle(Same((factory, kind)), shapes_of(params), shapes_of(lr))
    return None if isinstance(found, str) else found


def no_edge_of(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, kind: Kind | None
) -> str | None:
    """Why no curvature says when the optimizer is unstable, if that is seen so."""
    given = Same((factory, kind)), shapes_of(params), shapes_of(lr)
    found = _angle(*given)
    if isinstance(found, str):
        return found
    return NO_LINE if _bends(*given) else None


@functools.lru_cache(maxsize=512)
def _bends(same: Same, params: Shapes, lr: Shapes) -> bool:
    """Whether twice a small gradient moves it by other than twice as much."""
    factory, kind = same.thing
    split = split_of(factory, tree_of(params), tree_of(lr), kind)
    if split.refusal:
        return False
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        trial, state = settled_trial(factory, params, lr, split, 1.0)
        (draw,) = trial.gradients(0, 1)
        moved = [
            jax.tree.leaves(trial.step(merge(state), optax.tree.scale(size, draw))[0])
            for size in (0.0, SMALL, 2 * SMALL)
        ]
        for leaves in zip(*moved, strict=True):
            x, y, z = (np.asarray(leaf).astype(np.float64) for leaf in leaves)
            if np.any(np.abs(z - 2 * y + x) > BENT * np.abs(z - x).max(initial=0.0)):
                return True
        return False


@functools.lru_cache(maxsize=512)
def _angle(same: Same, params: Shapes, lr: Shapes) -> float | str | None:
    """The angle, why there is none, or `None` where neither is seen."""
    factory, kind = same.thing
    split = split_of(factory, tree_of(params), tree_of(lr), kind)
    given = [x.size for x in lr[1]]
    if split.opaque:
        return f"it {split.opaque}"
    if split.refusal or given not in ([], [1]):
        return None
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        trial, state = settled_trial(factory, params, lr, split, 1.0)
        try:
            slots = slots_of(state)
        except ValueError as error:
            return str(error)
        if max(map(len, slots)) == 1:
            # Where nothing is remembered the map is a real number.
            return math.pi
        return _first(trial, state, slots)


def _first(trial: Trial, state: State, slots: list[list[int]]) -> float | str | None:
    """The angle of the coordinate that loses stability first, or why there is none."""
    phase, params = jax.tree.leaves(state.phase), jax.tree.leaves(state.params)

    def tiny(tree: PyTree, multiples: Numbers) -> PyTree:
        leaves, structure = jax.tree.flatten(tree)
        pairs = zip(multiples, leaves, strict=True)
        return structure.unflatten([jnp.asarray(TINY * m, x.dtype) for m, x in pairs])

    def answer(phase: Numbers, grad: Numbers) -> Numbers:
        """The phase after a step from `phase` with `grad`, all of them times TINY."""
        at = state._replace(phase=tiny(state.phase, phase))
        after = trial.step(merge(at), tiny(state.params, grad))
        leaves = jax.tree.leaves(split_like(after, state).phase)
        return [np.asarray(x).astype(np.float64) / TINY for x in leaves]

    def column(i: int | None) -> Numbers:
        """The answer to a one in the i-th slot of each, or in the gradient."""
        ours = {s[i] for s in slots if i is not None and i < len(s)}
        one = [np.full(x.shape, float(k in ours)) for k, x in enumerate(phase)]
        return answer(one, [np.full(x.shape, float(i is None)) for x in params])

    columns = [column(i) for i in range(max(map(len, slots)))]
    forced = column(None)
    rng = np.random.default_rng(0)
    some = [rng.standard_normal(x.shape) for x in phase]
    grad = [rng.standard_normal(x.shape) for x in params]
    seen, found = answer(some, grad), []
    for slot, g in zip(slots, grad, strict=True):
        gather = lambda leaves, slot=slot: np.stack([leaves[k] for k in slot], -1)
        free = np.stack([gather(c) for c in columns[: len(slot)]], -1)
        response = gather(forced)
        told = np.einsum("...ij,...j->...i", free, gather(some))
        told += response * g[..., None]
        if not g.size:
            continue
        # Linear, and of each coordinate by itself; written so that NaN is neither.
        if not np.all(np.abs(gather(seen) - told) <= APART * np.abs(told).max()):
            return NO_LINE
        n = len(slot)
        found.append(_crossing(free.reshape(-1, n, n)[0], response.reshape(-1, n)[0]))
    curvature, angle = min(found, default=(math.inf, math.pi))
    return angle if curvature < math.inf else None


def _crossing(free: np.ndarray, response: np.ndarray) -> tuple[float, float]:
    """`crossing` for numbers: the roots of Im(P conj(Q)) on the unit circle."""
    bent = free.copy()
    bent[:, 0] += response
    p = np.poly(free)
    q = p - np.poly(bent)
    roots = np.roots(np.convolve(p, q[::-1]) - np.convolve(p[::-1], q))
    # An angle next to none is no oscillation, and one next to pi is pi.
    circle = (abs(abs(roots) - 1) < NEAR) & (roots.imag > NEAR)
    angles = np.append(np.angle(roots[circle]), np.pi)
    below = np.polyval(q, np.exp(1j * angles))
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = (np.polyval(p, np.exp(1j * angles)) / below).real
    gains = np.where(gains > 0, gains, np.inf)
    first = np.argmin(gains)
    return float(gains[first]), float(angles[first])
