"""What a probe looks at, and what it makes of it."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from rodjax.training._inputs import Given, Groups
from rodjax.training._probe import (
    Curved,
    Tracked,
    blocks,
    pushed,
    shares,
    tracked,
    tracked_ratio,
)
from rodjax.training._quantities import QUANTITIES, TRACKED
from rodjax.training._status import CLEAR, NEAR, Course, Look, next_status, with_loss
from rodjax.training._step import Values, lengths, turned
from rodjax.training._trees import along, over


class Kept(NamedTuple):
    """What a probe changes; the fields as in `WatchState`."""

    values: Values
    directions: dict[str, PyTree]
    course: Course
    status: Int[Array, ""]
    probed_at: Int[Array, ""]


class Plan(NamedTuple):
    """What a probe is to do.

    - `optimizer`: that which is watched, for its thresholds.
    - `names`: the quantities whose input is given.
    - `products`: for each direction.
    - `groups`: of parameters.
    - `counts`: whether every step's loss counts for the status.
    """

    optimizer: optax.GradientTransformation
    names: frozenset[str]
    products: int
    full_batch: bool
    groups: Groups
    counts: bool


def probe(
    plan: Plan,
    given: Given,
    steps: PyTree,
    inner: PyTree,
    step: Array,
    dtype: jnp.dtype,
    kept: Kept,
) -> Kept:
    """`kept` after a look at the curvature where the step `steps` began."""
    values, directions = dict(kept.values), dict(kept.directions)
    names, grad, size = plan.names, given.grad, lengths(given, steps, dtype)
    batch = None if given.batch is None else Curved(given.batch, given.params)
    whole = batch if given.probe is None else Curved(given.probe, given.params)
    found: dict[str, Tracked] = {}

    if batch is not None:
        if "realized_edge" in names and not plan.full_batch:
            value = batch.loss(given.params) if given.value is None else given.value
            after = batch.loss(optax.apply_updates(given.params, steps))
            there, gain = over((after - value).astype(dtype), size.slope)
            zeta = jnp.stack([there, jnp.where(there > 0, 1 - gain, 0)])
            values["realized_edge"] = values["realized_edge"].at[:2].set(zeta)
        if "step_curvature" in names:
            bend = along(steps, batch.product(steps), dtype)
            values["step_curvature"] = over(bend, -size.slope)
        if "batch_sharpness" in names:
            bend = along(grad, batch.product(grad), dtype)
            new = over(bend, along(grad, grad, dtype))
            values["batch_sharpness"] = pushed(values["batch_sharpness"], new)
    if whole is not None:
        if "noise_interaction" in names:
            bend = along(grad, whole.product(grad), dtype)
            new = over(bend, along(whole.grad, whole.grad, dtype))
            values["noise_interaction"] = pushed(values["noise_interaction"], new)
        for name in TRACKED:
            if name not in names:
                continue
            start = directions[name], grad, plan.products, dtype
            if name == "sharpness_ratio":
                pair = tracked_ratio(plan.optimizer, whole, inner, *start)
            else:
                pair = tracked(whole, *start)
            found[name], values[name] = pair, pair.numbers
            directions[name] = pair.direction
        if plan.groups:
            vectors = directions["block_sharpness"]
            each, directions["block_sharpness"] = blocks(
                whole, vectors, grad, plan.groups, plan.products, dtype
            )
            values |= {f"block_sharpness/{name}": x for name, x in each.items()}

    course = kept.course
    if found:
        first = next(iter(found.values()))
        if "oscillation" in names:
            values["oscillation"] = turned(values["oscillation"], first.overlap)
        if plan.groups:
            each = shares(first.top, plan.groups, dtype)
            keep = lambda x: jnp.where(first.early, 0, x)
            values |= {f"share/{name}": keep(x) for name, x in each.items()}
    if whole is not None and not plan.counts:
        course = with_loss(course, whole.value)
    status, course = next_status(kept.status, course, _look(values, found, dtype))
    return Kept(values, directions, course, status, step)


def _look(values: Values, found: dict[str, Tracked], dtype: jnp.dtype) -> Look:
    no, none = jnp.zeros((), bool), jnp.zeros((), dtype)
    ratio, there, early = none, no, no
    if "sharpness_ratio" in found:
        there, ratio, _ = found["sharpness_ratio"].numbers
        there, early = there > 0, found["sharpness_ratio"].early
    edge, lost = no, no
    if "realized_edge" in values:
        known, zeta = values["realized_edge"][:2]
        lost = (known > 0) & (zeta > 1)
        if "oscillation" in values:
            read = QUANTITIES["oscillation"].read(values["oscillation"], jnp)
            clear = read[""] > CLEAR * read["_floor"]
            edge = (known > 0) & (jnp.abs(zeta - 1) < NEAR) & clear
    return Look(ratio, there, early, edge, lost)
