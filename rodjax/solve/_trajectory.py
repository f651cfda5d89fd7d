"""What a run of an optimizer and a solution of a flow have in common."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer import State

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


class MetricInitFn(Protocol):
    """`init(snapshot, *, lr) -> carry`."""

    def __call__(self, snapshot: Snapshot, /, *, lr: PyTree) -> Any: ...


class MetricUpdateFn(Protocol):
    """`update(snapshot, carry, *, lr) -> (values, carry)`."""

    def __call__(
        self, snapshot: Snapshot, carry: Any, /, *, lr: PyTree
    ) -> tuple[dict[str, Any], Any]: ...


class Metric(NamedTuple):
    """A quantity recorded along a trajectory, in Optax's (init, update) shape.

    - `init(snapshot, *, lr) -> carry`: what is handed from one moment to the next, such
      as an eigenvector for a warm start.
    - `update(snapshot, carry, *, lr) -> (values, carry)`: named scalars, and the carry.
      A value may be a whole pytree, such as `snapshot.centre`, to compute from later;
      take it out of `Trajectory.metrics` before `dataset`, which has no place for it.
    - `long_names`: name -> what a data set says of the value, if that is not the name.

    Two that record the same name are refused where they are used together.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * jnp.sum(w**2))
    >>> def update(snapshot, largest, *, lr):  # the largest loss so far
    ...     largest = jnp.maximum(largest, sgd.loss(snapshot.centre.params))
    ...     return {"largest_loss": largest}, largest
    >>> largest = rj.Metric(lambda snapshot, *, lr: jnp.array(0.0), update)
    >>> run = rj.descend(sgd, jnp.ones(2), 3, metrics=[largest])
    >>> run.metrics["largest_loss"].tolist()
    [1.0, 1.0, 1.0, 1.0]

    ```
    """

    init: MetricInitFn
    update: MetricUpdateFn
    long_names: Mapping[str, str] = MappingProxyType({})


class Reached(NamedTuple):
    """Where the solution of a flow has got to, and goes on from.

    - `time`: optimizer steps since the very first one, [].
    - `state`: the flow's own state.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * jnp.sum(w**2))
    >>> flow = rj.flows.modulated(sgd)
    >>> half = rj.integrate(flow, jnp.ones(2), 4)
    >>> rest = rj.integrate(flow, half.final, 4)
    >>> float(half.final.time), rest.steps.tolist()
    (4.0, [4.0, 5.0, 6.0, 7.0, 8.0])

    ```
    """

    time: Float[Array, ""]
    state: Any


class Trajectory(eqx.Module):
    """A run or a flow at its T saved moments; leading axes may precede T under vmap.

    - `steps`: [T], optimizer steps; half-integers where a flow's centre models the
      half-step midpoint.
    - `params`: the centre's parameters, each leaf [T, ...]: a flow's centre, a run's
      second-order midpoints. What `keep` makes of them if it was given.
    - `ends`: likewise [T, m, ...]: for a run m = 2, the iterates w[t] and w[t+1].
    - `metrics`: name -> [T]; of a metric's pytree each leaf [T, ...].
    - `final`: where to go on from, as the `start` of another call: of a run its
      `Window`, of a flow `Reached`. Of a lane that diverged, the last finite one.
    - `evaluations`: update-map evaluations spent, []; NaN for a solver whose stages
      cannot be counted.
    - `diverged_at`: the saved moment by which it had left for good (see `limit` of
      `descend`) or the first step that was not finite; infinite if it did not, [].
      Entries from there on are NaN, of a run that was not finite also the three before
      it, whose window reaches that far.
    - `long_names`: pairs of a metric's name and what a data set says of it; static.

    A run in two halves is the run in one:

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> adam = rj.dynamics(optax.adam(0.1), lambda w: jnp.sum(w**4))
    >>> whole = rj.descend(adam, jnp.ones(2), 8)
    >>> half = rj.descend(adam, jnp.ones(2), 4)
    >>> rest = rj.descend(adam, half.final, 4)
    >>> rest.steps.tolist(), bool((rest.params == whole.params[4:]).all())
    ([4.0, 5.0, 6.0, 7.0, 8.0], True)

    ```
    """

    steps: Float[Array, "*batch T"]
    params: PyTree
    ends: PyTree
    metrics: dict[str, Any]
    final: Any
    evaluations: Float[Array, "*batch"]
    diverged_at: Float[Array, "*batch"]
    long_names: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())
