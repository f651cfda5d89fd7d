"""One loop for runs and flows: from moment to moment, saving and measuring."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.solve._course import Course
from rodjax.solve._trajectory import Metric, Progress, Snapshot, Trajectory

# Calls of `progress` along a trajectory at most: each of them waits for the host.
CALLS = 100


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


def begin(
    course: Course,
    state: Any,
    metrics: Sequence[Metric],
    diverged_at: Array | float = jnp.nan,
) -> Place:
    """The place before anything is saved, of a lane that may be lost already."""
    seen = course.look(state)
    carries = tuple(m.init(seen, lr=course.lr) for m in metrics)
    diverged_at = jnp.full_like(seen.step, diverged_at)
    return Place(state, carries, diverged_at, jnp.zeros_like(seen.step))


def proceed(course: Course, place: Place) -> Place:
    """To the next moment.

    Once an advance fails the lane is frozen at its last finite state: it costs nothing
    to the others, and what it saves from there on is NaN.
    """
    alive = jnp.isnan(place.diverged_at)
    state, lost_at, calls = course.advance(place.shown())
    ok = jnp.isnan(lost_at) & alive
    return place._replace(
        state=optax.tree.where(ok, state, place.state),
        diverged_at=jnp.where(alive, lost_at, place.diverged_at),
        evaluations=place.evaluations + jnp.where(alive, calls, 0),
    )


def measure(
    course: Course, place: Place, metrics: Sequence[Metric]
) -> tuple[Place, Snapshot, dict[str, Any]]:
    """The present moment and all that is recorded of it, NaN if the lane is lost.

    **Raises** `ValueError` where two record the same name.
    """
    seen = course.look(place.shown())
    values, carries = dict(seen.report), []
    owners = dict.fromkeys(values, "the flow itself")
    for index, (metric, carry) in enumerate(zip(metrics, place.carries, strict=True)):
        named, following = metric.update(seen, carry, lr=course.lr)
        owner = f"{_name(metric)} (number {index})" if index else "every trajectory"
        for name in named:
            if name in owners:
                raise ValueError(
                    f"metrics: {name!r} is recorded by {owners[name]} and by {owner}: "
                    "leave one of them out, or record it under another name"
                )
        owners |= dict.fromkeys(named, owner)
        values |= named
        carries.append(following)
    ok = jnp.isnan(place.diverged_at)
    hide = lambda tree: jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), tree)
    shown = seen._replace(centre=hide(seen.centre), ends=hide(seen.ends))
    return place._replace(carries=tuple(carries)), shown, hide(values)


def record(
    course: Course,
    state: Any,
    metrics: Sequence[Metric],
    keep: Callable[[PyTree], PyTree],
    progress: Progress | None,
    moments: int,
    every: int,
) -> Trajectory:
    """Save the first moment and `moments` more, `every` steps apart."""
    stride = moments // CALLS + 1

    def moment(place: Place, index: Array) -> tuple[Place, Any]:
        # A branch, so that what is saved is compiled once only.
        stay, go = (lambda place: place), lambda place: proceed(course, place)
        place = jax.lax.cond(index == 0, stay, go, place)
        place, seen, values = measure(course, place, metrics)
        if progress is not None:
            # A lane that has diverged is still told apart from others by its step.
            step = course.look(place.state).step
            due = (moments - index) % stride == 0
            tell = partial(jax.debug.callback, progress)
            jax.lax.cond(due, tell, lambda *_: None, step, values["loss"])
        return place, (keep(seen.centre.params), jax.vmap(keep)(seen.ends), values)

    indices = jnp.arange(moments + 1)
    end, saved = jax.lax.scan(moment, begin(course, state, metrics), indices)
    step = course.look(state).step
    params, ends, values = saved
    named = dict(course.reports)
    for metric in metrics:
        named |= metric.long_names
    return Trajectory(
        steps=step + every * jnp.arange(moments + 1, dtype=step.dtype),
        params=params,
        ends=ends,
        metrics=values,
        final=end.state,
        evaluations=end.evaluations,
        diverged_at=end.diverged_at,
        long_names=tuple(named.items()),
    )


def _name(metric: Metric) -> str:
    """What a metric is called in an error: the function that made it."""
    name = getattr(metric.update, "__qualname__", type(metric.update).__name__)
    return name.split(".<locals>")[0]
