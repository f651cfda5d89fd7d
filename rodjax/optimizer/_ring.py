"""A window that goes along with a run, at the cost of one state a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._state import State
from rodjax.optimizer._window import REACH, Window

LENGTH = 2 * REACH + 1


class Ring(NamedTuple):
    """The states of a `Window`, of which each new one takes the oldest one's place.

    So that a loop changes one state of seven at a step, in place.

    - `states`: leading axis of 7, in the window's order from the slot `oldest` on.
    - `slot`: where the next state belongs, [], the same in all lanes of a vmap.
    - `oldest`: the slot of the oldest state, []; `slot`, unless the run has stopped.
    - `step`: the step of the middle state.

    `at(ahead)` is the state at step `step + ahead` of a run that has not stopped.
    """

    states: State
    slot: Int[Array, ""]
    oldest: Int[Array, ""]
    step: Float[Array, ""]

    def at(self, ahead: int) -> State:
        """The state at step `step + ahead`, with -3 <= ahead <= 3."""
        slot = (self.slot + REACH + ahead) % LENGTH
        return jax.tree.map(lambda x: _read(x, slot), self.states)


def ring(window: Window) -> Ring:
    """The ring that begins with a window."""
    # Each its own, for what is carried from one program to another may be donated.
    first = lambda: jnp.zeros((), jnp.int32)
    return Ring(window.states, first(), first(), window.step)


def push(ring: Ring, new: State, go: ArrayLike) -> tuple[Ring, State]:
    """The ring one step later, `new` being its newest state; stopped unless `go`.

    And what its slot then holds: `new`, or of a lane that has stopped an old state. To
    carry that, and not `new` beside it, spares a loop a copy of the state.
    """
    there = lambda x, y: jnp.where(go, y, _read(x, ring.slot))
    put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, ring.slot, 0)
    held = jax.tree.map(there, ring.states, new)
    moved = jnp.asarray(go, jnp.int32)
    after = Ring(
        jax.tree.map(put, ring.states, held),
        (ring.slot + 1) % LENGTH,
        (ring.oldest + moved) % LENGTH,
        ring.step + jnp.astype(moved, ring.step.dtype),
    )
    return after, held


def unrolled(ring: Ring) -> Window:
    """The window that a ring holds, in order, without a second one in memory."""

    def turned(x: Array) -> Array:
        # The cycle of a turn by as many slots: seven is a prime.
        def one(k: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, first = carry
            there, here = (k + 1) * ring.oldest % LENGTH, k * ring.oldest % LENGTH
            y = jnp.where(k == LENGTH - 1, first, _read(x, there))
            return jax.lax.dynamic_update_index_in_dim(x, y, here, 0), first

        return jax.lax.fori_loop(0, LENGTH, one, (x, x[0]))[0]

    return Window(jax.tree.map(turned, ring.states), ring.step)


def go_on(dynamics: Dynamics, window: Window, steps: int, lr: PyTree) -> Window:
    """The window that many optimizer steps later."""

    def one(_: Any, carry: tuple[Ring, State]) -> tuple[Ring, State]:
        ring, newest = carry
        return push(ring, dynamics.update(newest, lr=lr), True)

    # Of fixed length, which reverse-mode differentiation needs.
    before = ring(window), window.at(REACH)
    return unrolled(jax.lax.fori_loop(0, steps, one, before)[0])


def _read(x: Array, slot: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(x, slot, keepdims=False)
