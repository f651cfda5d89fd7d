"""Whether an optimizer ever clips a gradient, seen in a few of its steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from rodjax.optimizer._state import merge, split_like

# A gradient that anything clips which clips at all, and one that nothing does.
HUGE, TINY = 1e8, 1e-18
# Of the root of a second moment, the largest gradients that it meets.
BURST = 30.0
# Of the answer to a huge gradient that the answer to a tiny one may leave unexplained.
APART = 1e-3


def undone(slow: PyTree, kept: PyTree, moved: PyTree) -> PyTree:
    """Second moments that a gradient moves to `kept`, as no gradient moves `slow`.

    `moved` is what the gradient makes of `slow`: linear in what a second moment was and
    in what is added to it.
    """
    return jax.tree.map(
        lambda s, k, m: jnp.where(k > 0, s * ((2 * k - m) / k), s), slow, kept, moved
    )


def clips_of(
    factory: OptimizerFactory, params: PyTree, lr: PyTree, kind: Kind | None
) -> bool:
    """Whether some gradients move the optimizer by less than others would tell.

    Of shapes alone, and without compiling a program. True also where that is not seen.
    """
    return _clips(Same((factory, kind)), shapes_of(params), shapes_of(lr))


@functools.lru_cache(maxsize=512)
def _clips(same: Same, params: Shapes, lr: Shapes) -> bool:
    factory, kind = same.thing
    split = split_of(factory, tree_of(params), tree_of(lr), kind)
    if split.refusal or split.opaque:
        return True
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        slow = (HUGE / BURST) ** 2
        trial, state = settled_trial(factory, params, lr, split, slow)
        rng = np.random.default_rng(0)
        draw = jax.tree.map(lambda x: rng.standard_normal(x.shape), state.params)

        def step(slow: PyTree, size: float) -> Any:
            grad = jax.tree.map(
                lambda d, x: jnp.asarray(size * d, x.dtype), draw, state.params
            )
            after = trial.step(merge(state._replace(slow=slow)), grad)
            return split_like(after, state)

        numbers = lambda tree: [
            np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)
        ]
        still, moved = step(state.slow, 0.0), step(state.slow, HUGE)
        slow = undone(state.slow, still.slow, moved.slow)
        little = numbers(step(state.slow, TINY).params)
        much = numbers(step(slow, HUGE).params)
        for rest, one, other in zip(numbers(still.params), little, much, strict=True):
            told = (one - rest) * (HUGE / TINY)
            # Written so that NaN is no agreement.
            if not np.all(np.abs(other - rest - told) <= APART * np.abs(told)):
                return True
        return False
