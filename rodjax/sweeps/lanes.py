"""The one compiled program of a sweep: a chunk of lanes over a chunk of time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from rodjax.compare import separation
from rodjax.courses import Method, at_start, descent, solution
from rodjax.dynamics import Dynamics
from rodjax.flows.base import Flow
from rodjax.integrate import everything
from rodjax.sweeps.grid import SEED
from rodjax.trajectory import Course, Metric, Place, Recorder, Saved
from rodjax.window import warm_up

#: The optimizer's own entry among the flows.
RUN = "run"

Point = dict[str, Array]
Places = dict[str, Place]


class Spec(NamedTuple):
    """What every lane computes; static, so equal ones share a compilation.

    - `draw(key) -> params`: initial parameters of a lane, if they differ.
    - `keep(params)`: what to keep of the parameters at every saved moment.
    """

    dynamics: Dynamics
    draw: Callable[[Array], PyTree] | None
    flows: tuple[tuple[str, Flow], ...]
    start: int
    every: int
    metrics: tuple[Metric, ...]
    keep: Callable[[PyTree], PyTree]
    method: Method


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


def begin(spec: Spec, params: PyTree, point: Point) -> Places:
    """A lane's first moment, `start` steps after its initial parameters."""
    key = jax.random.key(point.get(SEED, 0))
    params = params if spec.draw is None else spec.draw(key)
    lr = _lr(spec, point, params)
    window = warm_up(spec.dynamics, params, lr=lr)
    run_up = descent(spec.dynamics, lr, spec.start).advance(window)
    window = run_up.state
    states = {name: at_start(flow, window, lr, key) for name, flow in spec.flows}
    # No flow can start from a run that is lost already.
    diverged_at = jnp.where(run_up.ok, jnp.nan, run_up.step)
    recorder = _recorder(spec)
    return {
        name: recorder.begin(course, states.get(name, window), diverged_at)
        for name, course in _courses(spec, lr).items()
    }


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
    places = jax.lax.cond(fresh, lambda: begin(spec, params, point), lambda: places)
    lr = _lr(spec, point, places[RUN].state.at(0).params)
    courses, recorder = _courses(spec, lr), _recorder(spec)

    def proceed(places: Places) -> Places:
        return {
            name: recorder.proceed(course, places[name])
            for name, course in courses.items()
        }

    def save(places: Places) -> tuple[Places, PyTree]:
        reached = {
            name: recorder.save(course, places[name])
            for name, course in courses.items()
        }
        row = _row(spec, {name: saved for name, (_, saved) in reached.items()})
        return {name: place for name, (place, _) in reached.items()}, row

    def body(moment, carry):
        places, rows = carry
        # The first is saved in the same loop, so that `save` is compiled once.
        places, row = save(jax.lax.cond(moment > 0, proceed, lambda p: p, places))
        return places, jax.tree.map(lambda x, r: x.at[moment].set(r), rows, row)

    rows = jax.tree.map(
        lambda x: jnp.full((length + 1, *x.shape), jnp.nan, x.dtype),
        jax.eval_shape(lambda: save(places)[1]),
    )
    first = jnp.where(fresh, 0, 1)
    places, (metrics, kept) = jax.lax.fori_loop(first, count + 1, body, (places, rows))
    return places, Rows(
        metrics,
        kept,
        {name: place.diverged_at for name, place in places.items()},
        {name: place.evaluations for name, place in places.items()},
    )


def _lr(spec: Spec, point: Point, params: PyTree) -> PyTree:
    return spec.dynamics.cast(params, hyperparameters(point))


def _courses(spec: Spec, lr: PyTree) -> dict[str, Course]:
    courses = {RUN: descent(spec.dynamics, lr, spec.every)}
    for name, flow in spec.flows:
        courses[name] = solution(flow, lr, spec.every, spec.method)
    return courses


def _recorder(spec: Spec) -> Recorder:
    return Recorder(spec.dynamics.loss, spec.metrics, everything, None)


def _row(spec: Spec, saved: dict[str, Saved]) -> tuple[PyTree, PyTree]:
    """The metrics and kept parameters of all models at one moment."""
    run = saved[RUN]
    metrics = {name: one.metrics for name, one in saved.items()}
    for name, flow in spec.flows:
        early = jnp.asarray(flow.offset)
        distance = separation(early, saved[name].params, run.params, run.ends)
        metrics[name] = metrics[name] | {"distance": distance}
    return metrics, {name: spec.keep(one.params) for name, one in saved.items()}
