"""What a run of an optimizer and a solution of a flow have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.dynamics import Loss, State

Progress = Callable[[Array, Array], None]


class Snapshot(NamedTuple):
    """One saved moment, of a run or of a flow.

    - `step`: optimizer steps since the very first one, [].
    - `centre`: the optimizer state at the centre: a run's second-order midpoint.
    - `ends`: parameters with a leading axis, the points between which the iterates
      jump: a run's w[t] and w[t+1].
    - `amplitude`: size of the oscillation of the parameters about the centre, []: for
      a run the norm of its alternating part.
    - `report`: named scalars that a flow tells of itself; of a run none.
    """

    step: Float[Array, ""]
    centre: State
    ends: PyTree
    amplitude: Float[Array, ""]
    report: dict[str, Array]


class Metric(NamedTuple):
    """A quantity recorded along a trajectory, in Optax's (init, update) shape.

    - `init(snapshot, lr) -> carry`: what is handed from one moment to the next, such
      as an eigenvector for a warm start.
    - `update(snapshot, carry, lr) -> (values, carry)`: named scalars, and the carry.
    """

    init: Callable[[Snapshot, PyTree], Any]
    update: Callable[[Snapshot, Any, PyTree], tuple[dict[str, Array], Any]]


class Trajectory(NamedTuple):
    """A run or a flow at its T saved moments; leading axes may precede T under vmap.

    - `steps`: [T], optimizer steps; half-integers where a flow's centre models the
      half-step midpoint.
    - `params`: the centre's parameters, each leaf [T, ...]: a flow's centre, a run's
      second-order midpoints. A projection of them if one was asked for.
    - `ends`: likewise [T, m, ...]: for a run m = 2, the iterates w[t] and w[t+1].
    - `metrics`: name -> [T].
    - `final`: the state to go on from: a flow's own state, a run's `Window`. Of a lane
      that diverged, the last finite one.
    - `evaluations`: update-map evaluations spent, []; NaN for a solver whose stages
      cannot be counted.
    - `diverged_at`: the first step that was not finite, NaN if every one was, [].
      Entries from that step on are NaN, of a run also the three before it, whose window
      reaches that far.
    """

    steps: Float[Array, "*batch T"]
    params: PyTree
    ends: PyTree
    metrics: dict[str, Float[Array, "*batch T"]]
    final: Any
    evaluations: Float[Array, "*batch"]
    diverged_at: Float[Array, "*batch"]


class Advance(NamedTuple):
    """The outcome of going from one saved moment to the next.

    - `state`: the new state; `ok`: whether all of it is finite.
    - `step`: where it stopped being so; `calls`: update-map evaluations spent.
    """

    state: Any
    ok: Array
    step: Array
    calls: Array


class Recorder(NamedTuple):
    """What to save of a trajectory, and how often.

    All of it is static under jit: two that are equal share a compilation.
    """

    loss: Loss
    moments: int
    every: int
    metrics: tuple[Metric, ...]
    project: Callable[[PyTree], PyTree]
    progress: Progress | None

    def record(
        self,
        state: Any,
        snapshot: Callable[[Any], Snapshot],
        advance: Callable[[Any], Advance],
        lr: PyTree,
    ) -> Trajectory:
        """Scan `advance`, saving a projected snapshot at the start and after each.

        Once an advance fails the lane is frozen at its last finite state: it costs
        nothing to the others, and what it saves from there on is NaN.
        """

        metrics = (losses(self.loss), *self.metrics)

        def save(state, carries, ok):
            seen = snapshot(state)
            values, new = dict(seen.report), []
            for metric, carry in zip(metrics, carries, strict=True):
                named, following = metric.update(seen, carry, lr)
                values |= named
                new.append(following)
            if self.progress is not None:
                jax.debug.callback(self.progress, seen.step, values["loss"])
            ends = jax.vmap(self.project)(seen.ends)
            kept = (self.project(seen.centre.params), ends, values)
            return jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), kept), tuple(new)

        def body(carry, _):
            state, carries, diverged_at, evaluations = carry
            alive = jnp.isnan(diverged_at)
            new = advance(state)
            ok = new.ok & alive
            state = optax.tree.where(ok, new.state, state)
            diverged_at = jnp.where(alive & ~ok, new.step, diverged_at)
            evaluations += jnp.where(alive, new.calls, 0)
            saved, carries = save(state, carries, ok)
            return (state, carries, diverged_at, evaluations), saved

        seen = snapshot(state)
        carries = tuple(metric.init(seen, lr) for metric in metrics)
        first, carries = save(state, carries, jnp.asarray(True))
        never, none = jnp.full_like(seen.step, jnp.nan), jnp.zeros_like(seen.step)
        (state, _, diverged_at, evaluations), rest = jax.lax.scan(
            body, (state, carries, never, none), length=self.moments
        )
        saved = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)
        later = self.every * jnp.arange(self.moments + 1, dtype=seen.step.dtype)
        params, ends, values = saved
        return Trajectory(
            seen.step + later, params, ends, values, state, evaluations, diverged_at
        )


def losses(loss: Loss) -> Metric:
    """`loss` at the centre, `mean_loss` over the ends, and `amplitude`.

    Of a flow `mean_loss` is the predicted time average of the loss.
    """

    def update(snapshot, carry, lr):
        values = {
            "loss": loss(snapshot.centre.params),
            "mean_loss": jnp.mean(jax.vmap(loss)(snapshot.ends)),
            "amplitude": snapshot.amplitude,
        }
        return values, carry

    return Metric(lambda snapshot, lr: (), update)
