"""What a run of an optimizer and a solution of a flow have in common."""

from collections.abc import Callable, Mapping
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
    - `update(snapshot, carry, lr) -> (values, carry)`: named scalars, and the carry. A
      value may be a whole pytree, such as `snapshot.centre`, to compute from later;
      take it out of `Trajectory.metrics` before `dataset`, which has no place for it.
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
    - `metrics`: name -> [T]; of a metric's pytree each leaf [T, ...].
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


class Course(NamedTuple):
    """How one run or one flow is followed, from one saved moment to the next."""

    snapshot: Callable[[Any], Snapshot]
    advance: Callable[[Any], Advance]
    lr: PyTree


class Place(NamedTuple):
    """Where a course has got to: all that is needed to go on from there.

    - `state`: of the run or flow; of one that diverged the last finite one.
    - `carries`: of the metrics.
    - `diverged_at`, `evaluations`: as in `Trajectory`, so far.
    """

    state: Any
    carries: tuple[Any, ...]
    diverged_at: Array
    evaluations: Array

    def shown(self) -> Any:
        """The state, NaN once diverged.

        Inner iterations stop at NaN, whereas the last finite state of a lane may need
        many, for which all lanes of a vmap would wait.
        """
        alive = jnp.isnan(self.diverged_at)
        return jax.tree.map(lambda x: jnp.where(alive, x, jnp.nan), self.state)


class Saved(NamedTuple):
    """What is kept of one moment: the projected centre and ends, and the metrics."""

    params: PyTree
    ends: PyTree
    metrics: dict[str, Array]


class Recorder(NamedTuple):
    """What to save of a trajectory, and how often.

    All of it is static under jit: two that are equal share a compilation.
    """

    loss: Loss
    metrics: tuple[Metric, ...]
    project: Callable[[PyTree], PyTree]
    progress: Progress | None

    def begin(
        self, course: Course, state: Any, diverged_at: Array | float = jnp.nan
    ) -> Place:
        """The place before anything is saved, of a lane that may be lost already."""
        seen = course.snapshot(state)
        carries = tuple(m.init(seen, course.lr) for m in self._all())
        diverged_at = jnp.full_like(seen.step, diverged_at)
        return Place(state, carries, diverged_at, jnp.zeros_like(seen.step))

    def proceed(self, course: Course, place: Place) -> Place:
        """To the next moment.

        Once an advance fails the lane is frozen at its last finite state: it costs
        nothing to the others, and what it saves from there on is NaN.
        """
        alive = jnp.isnan(place.diverged_at)
        new = course.advance(place.shown())
        ok = new.ok & alive
        return place._replace(
            state=optax.tree.where(ok, new.state, place.state),
            diverged_at=jnp.where(alive & ~ok, new.step, place.diverged_at),
            evaluations=place.evaluations + jnp.where(alive, new.calls, 0),
        )

    def save(self, course: Course, place: Place) -> tuple[Place, Saved]:
        """What is kept of this moment, NaN if the lane has diverged."""
        seen = course.snapshot(place.shown())
        values, carries = dict(seen.report), []
        for metric, carry in zip(self._all(), place.carries, strict=True):
            named, following = metric.update(seen, carry, course.lr)
            values |= named
            carries.append(following)
        if self.progress is not None:
            # A lane that has diverged is still told apart from others by its step.
            step = course.snapshot(place.state).step
            jax.debug.callback(self.progress, step, values["loss"])
        ends = jax.vmap(self.project)(seen.ends)
        saved = Saved(self.project(seen.centre.params), ends, values)
        ok = jnp.isnan(place.diverged_at)
        saved = jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), saved)
        return place._replace(carries=tuple(carries)), saved

    def record(
        self, course: Course, state: Any, moments: int, every: int
    ) -> Trajectory:
        """Save the first moment and `moments` more, `every` steps apart."""

        def moment(place: Place, first: Array) -> tuple[Place, Saved]:
            # A branch, so that what is saved is compiled once only.
            stay, go = (lambda place: place), lambda place: self.proceed(course, place)
            return self.save(course, jax.lax.cond(first, stay, go, place))

        firsts = jnp.arange(moments + 1) == 0
        end, saved = jax.lax.scan(moment, self.begin(course, state), firsts)
        step = course.snapshot(state).step
        steps = step + every * jnp.arange(moments + 1, dtype=step.dtype)
        params, ends, metrics = saved
        return Trajectory(
            steps, params, ends, metrics, end.state, end.evaluations, end.diverged_at
        )

    def _all(self) -> tuple[Metric, ...]:
        return (losses(self.loss), *self.metrics)


#: Names of what is recorded along every trajectory.
LOSSES: tuple[str, ...] = ("loss", "mean_loss", "amplitude")


def monitor(functions: Mapping[str, Callable[[PyTree], Float[Array, ""]]]) -> Metric:
    """Functions of the parameters, recorded at the centre, such as an accuracy.

    **Arguments**

    - `functions`: name -> function of the parameters to a scalar, such as the `metrics`
      of a problem.

    **Raises** `ValueError` for a name of what is recorded anyway.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * jnp.sum(w**2))
    >>> size = rj.monitor({"size": lambda w: jnp.max(jnp.abs(w))})
    >>> run = rj.descend(sgd, jnp.ones(2), 3, metrics=[size])
    >>> [round(float(x), 3) for x in run.metrics["size"]]  # at the midpoints
    [1.0, 0.562, 0.281, 0.141]

    ```
    """
    functions = dict(functions)
    for name in LOSSES:
        if name in functions:
            raise ValueError(f"functions has {name!r}, which is recorded anyway")

    def update(snapshot, carry, lr):
        params = snapshot.centre.params
        return {name: f(params) for name, f in functions.items()}, carry

    return Metric(lambda snapshot, lr: (), update)


def losses(loss: Loss) -> Metric:
    """`loss` at the centre, `mean_loss` over the ends, and `amplitude`.

    Of a flow `mean_loss` is the predicted time average of the loss.
    """

    def update(snapshot, carry, lr):
        mean = jnp.mean(jax.vmap(loss)(snapshot.ends))
        values = loss(snapshot.centre.params), mean, snapshot.amplitude
        return dict(zip(LOSSES, values, strict=True)), carry

    return Metric(lambda snapshot, lr: (), update)
