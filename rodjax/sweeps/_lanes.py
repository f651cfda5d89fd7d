"""The one compiled program of a sweep: a chunk of lanes over a chunk of time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from rodjax.flows import Flow
from rodjax.optimizer import Dynamics, opening, precise
from rodjax.solve import (
    DRAWS,
    NUDGED,
    RUN,
    Course,
    Method,
    Metric,
    Place,
    Snapshot,
    begin,
    begun,
    descent,
    enter,
    itself,
    leave,
    look_at_all,
    losses,
    lost_at,
    measure_each,
    nudged_windows,
    proceed,
    separation,
    solution,
)
from rodjax.sweeps._grid import SEED

#: The parameters kept, in the result.
KEPT = "params"

Point = dict[str, Array]
Places = dict[str, Place]


class Spec(NamedTuple):
    """What every lane computes; static, so equal ones share a compilation.

    - `draw(key) -> params`: initial parameters of a lane, if they differ.
    - `warmup`: optimizer steps before the first moment; `every`: between moments.
    - `keep(params)`: what to keep of the parameters at every saved moment.
    - `limit`: of divergence, counted from the initial parameters; see `descend`.
    - `predictability`: whether the run is nudged too, as one more model.
    """

    dynamics: Dynamics
    draw: Callable[[Array], PyTree] | None
    flows: tuple[tuple[str, Flow], ...]
    warmup: int
    every: int
    metrics: tuple[Metric, ...]
    keep: Callable[[PyTree], PyTree]
    method: Method
    limit: float
    predictability: bool


class Rows(NamedTuple):
    """What a chunk adds to the result, by model: the run, and each flow.

    - `metrics`: name -> [lanes, moments]; of a flow also its `distance`.
    - `kept`: what `keep` makes of the centre's parameters, [lanes, moments, ...].
    - `diverged_at`, `evaluations`: [lanes], so far.
    """

    metrics: dict[str, dict[str, Array]]
    kept: dict[str, PyTree]
    diverged_at: dict[str, Array]
    evaluations: dict[str, Array]


def hyperparameters(point: Point) -> PyTree:
    """What a lane hands to the optimizer and the flows as `lr`.

    The learning rate itself where the grid has no other name but `seed`, else a dict.
    """
    named = {name: value for name, value in point.items() if name != SEED}
    return named["lr"] if named.keys() == {"lr"} else named or None


def set_out(spec: Spec, params: PyTree, point: Point) -> Places:
    """A lane's first moment, `warmup` steps after its initial parameters."""
    key = jax.random.key(point.get(SEED, 0))
    params = params if spec.draw is None else spec.draw(key)
    lr = _lr(spec, point, params)
    # Compiled for itself, lest fusions with the rest differ by the number of devices.
    window = jax.jit(partial(opening, spec.dynamics))(params, lr=lr)
    warmup = descent(spec.dynamics, lr, spec.warmup)
    run, lost, _ = warmup.advance(warmup.enter(window), True, True)
    window = warmup.leave(run)
    # No flow can start from a run that is lost already.
    states = {name: begun(flow, window, lr, key) for name, flow in spec.flows}
    courses = _courses(spec, lr)
    bounds = spec.limit, params, lost
    places = {
        name: begin(course, states.get(name, window), recorded(spec), *bounds)
        for name, course in courses.items()
    }
    if spec.predictability:
        # Those of `predictability`, with the seed that it has by default.
        of_run = spec.dynamics, window, lr, jax.random.key(0), DRAWS
        first = lambda w: begin(courses[RUN], w, (losses(spec.dynamics.loss),), *bounds)
        places[NUDGED] = jax.lax.map(first, nudged_windows(*of_run))
    return places


@precise
def follow(
    spec: Spec,
    length: int,
    params: PyTree,
    point: Point,
    places: Places,
    fresh: Array,
    count: Int[Array, ""],
) -> tuple[Places, Rows]:
    """One lane for `count <= length` more moments, after the first one if `fresh`.

    The first moment is in row 0, which is NaN otherwise; rows beyond `count` are NaN.
    """
    places = jax.lax.cond(fresh, lambda: set_out(spec, params, point), lambda: places)
    courses = _courses(spec, _lr(spec, point, places[RUN].state.at(0).params))
    metrics = recorded(spec)
    places = _each(enter, courses, places)

    def save(places: Places, moved: Array) -> tuple[Places, PyTree]:
        seen, values, following = {}, {}, {}
        for name, found in measure_each(courses, places, metrics).items():
            following[name], seen[name], values[name] = found
            _check(values[name], point)
        metrics_of, kept = _row(spec, seen, values)
        if spec.predictability:
            own = (losses(spec.dynamics.loss),)
            looked = look_at_all(courses[RUN], places[NUDGED], moved, own)
            following[NUDGED], midpoints, _ = looked
            metrics_of[NUDGED] = {"distance": itself(midpoints)}
            nothing = lambda x: jnp.full_like(x, jnp.nan)
            kept[NUDGED] = jax.tree.map(nothing, kept[RUN])
        return following, (metrics_of, kept)

    def body(moment, carry):
        places, rows = carry
        # The first is saved in the same loop, so that `save` is compiled once.
        moved = moment > 0
        places |= {
            name: proceed(course, places[name], moved)
            for name, course in courses.items()
        }
        places, row = save(places, moved)
        return places, jax.tree.map(lambda x, r: x.at[moment].set(r), rows, row)

    rows = jax.tree.map(
        lambda x: jnp.full((length + 1, *x.shape), jnp.nan, x.dtype),
        jax.eval_shape(lambda: save(places, jnp.array(True))[1]),
    )
    first = jnp.where(fresh, 0, 1)
    places, (metrics, kept) = jax.lax.fori_loop(first, count + 1, body, (places, rows))
    return _each(leave, courses, places), Rows(
        metrics,
        kept,
        {
            name: lost_at(place) if name == NUDGED else place.diverged_at
            for name, place in places.items()
        },
        # Of all nudged runs together.
        {name: jnp.sum(place.evaluations) for name, place in places.items()},
    )


def _lr(spec: Spec, point: Point, params: PyTree) -> PyTree:
    return spec.dynamics.cast(params, lr=hyperparameters(point))


def _courses(spec: Spec, lr: PyTree) -> dict[str, Course]:
    courses = {RUN: descent(spec.dynamics, lr, spec.every)}
    for name, flow in spec.flows:
        courses[name] = solution(flow, lr, spec.every, spec.method)
    return courses


def _each(
    change: Callable[[Course, Place], Place],
    courses: dict[str, Course],
    places: Places,
) -> Places:
    """The places of all models changed; those of the nudged runs in turn."""
    changed = {name: change(course, places[name]) for name, course in courses.items()}
    if NUDGED in places:
        nudged = places[NUDGED]
        changed[NUDGED] = jax.lax.map(partial(change, courses[RUN]), nudged)
    return changed


def models(spec: Spec) -> list[str]:
    """The entries of the result, in order: the run, the flows, the run nudged."""
    flows = [name for name, _ in spec.flows]
    return [RUN, *flows, *([NUDGED] if spec.predictability else [])]


def recorded(spec: Spec) -> tuple[Metric, ...]:
    """The metrics of every trajectory, and those of this sweep."""
    return losses(spec.dynamics.loss), *spec.metrics


def _check(values: dict[str, Any], point: Point) -> None:
    """Raise `ValueError` for what the labelled result has no place for."""
    taken = {*point, KEPT}
    for name, value in values.items():
        if name in taken:
            raise ValueError(
                f"metrics: {name!r} is the name of something else in a sweep's result: "
                "record it under another"
            )
        if [jnp.ndim(leaf) for leaf in jax.tree.leaves(value)] != [0]:
            raise ValueError(
                f"metrics: {name!r} is not one number, and a sweep records numbers: "
                "use keep= for what is kept of the parameters"
            )


def _row(
    spec: Spec, seen: dict[str, Snapshot], values: dict[str, dict[str, Array]]
) -> tuple[PyTree, PyTree]:
    """The metrics and kept parameters of all models at one moment."""
    run = seen[RUN]
    metrics = dict(values)
    for name, flow in spec.flows:
        early = jnp.asarray(flow.offset)
        distance = separation(
            early, seen[name].centre.params, run.centre.params, run.ends
        )
        metrics[name] = metrics[name] | {"distance": distance}
    return metrics, {name: spec.keep(one.centre.params) for name, one in seen.items()}
