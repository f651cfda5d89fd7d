"""One loop for runs and flows: from moment to moment, saving and measuring."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.flows import stack
from rodjax.solve._compare import COMPARED
from rodjax.solve._course import Course, hidden
from rodjax.solve._labels import FLOW, STEP
from rodjax.solve._trajectory import Metric, Progress, Snapshot, Trajectory

# Calls of `progress` along a trajectory at most: each of them waits for the host.
CALLS = 100
# What labelled results have beside metrics.
TAKEN = {*COMPARED, FLOW, STEP}


class Place(NamedTuple):
    """Where a course has got to: all that is needed to go on from there.

    - `state`: of the run or flow; of one that diverged the last finite one.
    - `carries`: of the metrics.
    - `bounds`: of the norm of the parameters and of the size of the loss; what is
      beyond both has diverged.
    - `diverged_at`, `evaluations`: as in `Trajectory`, so far.
    """

    state: Any
    carries: tuple[Any, ...]
    bounds: tuple[Array, Array]
    diverged_at: Array
    evaluations: Array

    def alive(self) -> Array:
        """Whether it has not diverged."""
        return ~jnp.isfinite(self.diverged_at)


def begin(
    course: Course,
    state: Any,
    metrics: Sequence[Metric],
    limit: float,
    origin: PyTree = None,
    diverged_at: Array | float = jnp.inf,
) -> Place:
    """The place before anything is saved, of a lane that may be lost already.

    It has diverged once it is beyond `limit` times the norm of the parameters `origin`
    and of the loss there; by default those at the start.
    """
    seen = course.look(course.enter(state), True)
    carries = tuple(m.init(seen, lr=course.lr) for m in metrics)
    origin = seen.centre.params if origin is None else origin
    sizes = _sizes(origin, course.loss(origin))
    bounds = jax.tree.map(lambda x: limit * x, sizes)
    diverged_at = jnp.full_like(seen.step, diverged_at)
    return Place(state, carries, bounds, diverged_at, jnp.zeros_like(seen.step))


def enter(course: Course, place: Place) -> Place:
    """The place as its course follows it."""
    return place._replace(state=course.enter(place.state))


def leave(course: Course, place: Place) -> Place:
    """The place as another program goes on from it."""
    return place._replace(state=course.leave(place.state))


def proceed(course: Course, place: Place, go: Array) -> Place:
    """To the next moment, or nowhere unless `go`.

    Once an advance fails the lane is frozen at its last finite state: it costs nothing
    to the others, and what it saves from there on is NaN.
    """
    alive = place.alive()
    state, lost_at, calls = course.advance(place.state, alive, go)
    return place._replace(
        state=state,
        diverged_at=jnp.where(alive, lost_at, place.diverged_at),
        evaluations=place.evaluations + jnp.where(alive, calls, 0),
    )


def measure(
    course: Course, place: Place, metrics: Sequence[Metric]
) -> tuple[Place, Snapshot, dict[str, Any]]:
    """The present moment and all that is recorded of it, NaN if the lane is lost.

    The first of the metrics is `losses`, which every trajectory has.

    **Raises** `ValueError` where two record the same name, or one the name of what a
    labelled result has itself.
    """
    seen = course.look(place.state, place.alive())
    values, carries = _values(seen, place.carries, metrics, course.lr)
    return _judged(place._replace(carries=carries), seen, values)


def measure_each(
    courses: Mapping[str, Course],
    places: Mapping[str, Place],
    metrics: Sequence[Metric],
) -> dict[str, tuple[Place, Snapshot, dict[str, Any]]]:
    """`measure` for several courses of the same `lr`.

    The metrics are in a loop over those whose snapshots are alike: an iteration for
    eigenvalues takes longer to compile than a flow, so there is one for all.
    """
    seen, alike = {}, {}
    for name, course in courses.items():
        snapshot = course.look(places[name].state, places[name].alive())
        # One end alone is as good as two in the same place.
        two = lambda x: jnp.repeat(x, 2, axis=0) if len(x) == 1 else x
        snapshot = snapshot._replace(ends=jax.tree.map(two, snapshot.ends))
        seen[name] = snapshot
        leaves, structure = jax.tree.flatten((snapshot, places[name].carries))
        kinds = tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)
        alike.setdefault((structure, kinds), []).append(name)
    found = {}
    for names in alike.values():
        one = partial(_values, metrics=metrics, lr=courses[names[0]].lr)
        given = stack(*((seen[name], places[name].carries) for name in names))
        values = jax.lax.map(lambda x, one=one: one(x[0], x[1]), given)
        for index, name in enumerate(names):
            own, carries = jax.tree.map(lambda x, i=index: x[i], values)
            place = places[name]._replace(carries=carries)
            found[name] = _judged(place, seen[name], own)
    return {name: found[name] for name in courses}


def _values(
    seen: Snapshot, carries: tuple[Any, ...], metrics: Sequence[Metric], lr: PyTree
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """All that is recorded of a moment, and what the metrics carry on."""
    values, following = dict(seen.report), []
    owners = dict.fromkeys(values, "the flow itself")
    for index, (metric, carry) in enumerate(zip(metrics, carries, strict=True)):
        named, carried = metric.update(seen, carry, lr=lr)
        owner = f"{_name(metric)} (number {index})" if index else "every trajectory"
        for name in named:
            if name in TAKEN or "/" in name:
                raise ValueError(
                    f"metrics: {name!r}, recorded by {owner}, is the name of something "
                    "else in a labelled result, or has a slash: record it under another"
                )
            if name in owners:
                raise ValueError(
                    f"metrics: {name!r} is recorded by {owners[name]} and by {owner}: "
                    "leave one of them out, or record it under another name"
                )
        owners |= dict.fromkeys(named, owner)
        values |= named
        following.append(carried)
    return values, tuple(following)


def _judged(
    place: Place, seen: Snapshot, values: dict[str, Any]
) -> tuple[Place, Snapshot, dict[str, Any]]:
    """Whether it has left by this moment; of one that has, what is NaN from here on."""
    far, high = _sizes(seen.centre.params, values["loss"])
    gone = (far > place.bounds[0]) & (high > place.bounds[1])
    left_at = jnp.where(place.alive() & gone, seen.step, place.diverged_at)
    place = place._replace(diverged_at=left_at)
    ok = place.alive()
    hide = partial(hidden, shown=ok)
    shown = seen._replace(centre=hide(seen.centre), ends=hide(seen.ends))
    return place, shown, jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), values)


def record(
    course: Course,
    state: Any,
    metrics: Sequence[Metric],
    keep: Callable[[PyTree], PyTree],
    progress: Progress | None,
    moments: int,
    every: int,
    limit: float,
    origin: PyTree,
) -> Trajectory:
    """Save the first moment and `moments` more, `every` steps apart."""
    stride = moments // CALLS + 1

    def moment(place: Place, index: Array) -> tuple[Place, Any]:
        # In the same loop as all others, so that what is saved is compiled once only.
        place = proceed(course, place, index > 0)
        place, seen, values = measure(course, place, metrics)
        if progress is not None:
            # A lane that has diverged is still told apart from others by its step.
            step = course.look(place.state, True).step
            due = (moments - index) % stride == 0
            tell = partial(jax.debug.callback, progress)
            jax.lax.cond(due, tell, lambda *_: None, step, values["loss"])
        return place, (keep(seen.centre.params), jax.vmap(keep)(seen.ends), values)

    indices = jnp.arange(moments + 1)
    first = enter(course, begin(course, state, metrics, limit, origin))
    step = course.look(first.state, True).step
    end, saved = jax.lax.scan(moment, first, indices)
    params, ends, values = saved
    named = dict(course.reports)
    for metric in metrics:
        named |= metric.long_names
    return Trajectory(
        steps=step + every * jnp.arange(moments + 1, dtype=step.dtype),
        params=params,
        ends=ends,
        metrics=values,
        final=leave(course, end).state,
        evaluations=end.evaluations,
        diverged_at=end.diverged_at,
        long_names=tuple(named.items()),
    )


def _sizes(params: PyTree, loss: Array) -> tuple[Array, Array]:
    """What tells that a lane has left: how far it is out, and how high."""
    return optax.tree.norm(params), jnp.abs(loss)


def _name(metric: Metric) -> str:
    """What a metric is called in an error: the function that made it."""
    name = getattr(metric.update, "__qualname__", type(metric.update).__name__)
    return name.split(".<locals>")[0]
