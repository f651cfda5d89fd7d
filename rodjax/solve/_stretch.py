"""Solver steps that are longer than from one saved moment to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from rodjax.solve._trajectory import Reached

# Optimizer steps that are solved for together, with all their states in memory.
SPAN = 64


class Stretch(NamedTuple):
    """A solution that is some moments ahead.

    - `now`: the present moment, or the last finite one.
    - `ahead`: all moments of this stretch, with a leading axis; `lost_at`: the step at
      which it was lost by then, infinite if it was not.
    - `nth`: which of them is the next one, [].
    """

    now: Reached
    ahead: Reached
    lost_at: Array
    nth: Array


def moments_together(every: int, moments: int) -> int:
    """Moments of a stretch, of which there are as many as need be, about as long."""
    stretches = -(-moments // max(1, SPAN // every))
    return -(-moments // stretches)


def enter(at: Reached, count: int) -> Stretch:
    """Nothing ahead yet of `count` moments."""
    ahead = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), at)
    never = jnp.full_like(ahead.time, jnp.inf)
    return Stretch(at, ahead, never, jnp.zeros((), jnp.int32))


def advance(
    solve: Callable[[Any, ArrayLike], tuple[Reached, Array, Array]],
    stretch: Stretch,
    alive: ArrayLike,
    go: ArrayLike,
) -> tuple[Stretch, Array, Array]:
    """To the next moment of the stretch, or to the first of another."""
    now, ahead, lost_at, nth = stretch
    keep = lambda *_: (ahead, lost_at, jnp.zeros_like(now.time))
    # Both the same in all lanes, so that this is a branch under vmap too.
    due = go & (nth == 0)
    ahead, lost_at, calls = jax.lax.cond(due, solve, keep, now, alive)
    lost = jnp.where(go, lost_at[nth], jnp.inf)
    ok = jnp.isinf(lost) & alive & go
    now = optax.tree.where(ok, _at(ahead, nth), now)
    nth = jnp.where(go, (nth + 1) % len(lost_at), nth)
    return Stretch(now, ahead, lost_at, nth), lost, calls


def _at(tree: PyTree, nth: Array) -> PyTree:
    return jax.tree.map(lambda x: x[nth], tree)
