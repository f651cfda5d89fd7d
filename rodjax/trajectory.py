"""What a run of an optimizer and a solution of a flow have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rodjax.dynamics import Loss, State


class Snapshot(NamedTuple):
    """One saved moment, of a run or of a flow.

    - `step`: optimizer steps since the very first one, [].
    - `centre`: the optimizer state at the centre: a run's second-order midpoint.
    - `ends`: parameters with a leading axis, the points between which the iterates
      jump: a run's w[t] and w[t+1].
    - `amplitude`: size of the oscillation of the parameters about the centre, [].
    """

    step: Float[Array, ""]
    centre: State
    ends: PyTree
    amplitude: Float[Array, ""]


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
      Entries from that step on are NaN.
    """

    steps: Float[Array, "*batch T"]
    params: PyTree
    ends: PyTree
    metrics: dict[str, Float[Array, "*batch T"]]
    final: Any
    evaluations: Float[Array, "*batch"]
    diverged_at: Float[Array, "*batch"]


def losses(loss: Loss) -> Metric:
    """`loss` at the centre, `mean_loss` over the ends, and `amplitude`."""

    def update(snapshot, carry, lr):
        values = {
            "loss": loss(snapshot.centre.params),
            "mean_loss": jnp.mean(jax.vmap(loss)(snapshot.ends)),
            "amplitude": snapshot.amplitude,
        }
        return values, carry

    return Metric(lambda snapshot, lr: (), update)
