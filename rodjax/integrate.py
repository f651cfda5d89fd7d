"""A flow solved with diffrax and the optimizer itself, as the same Trajectory."""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.dynamics import Dynamics
from rodjax.flows.base import Flow, stack
from rodjax.trajectory import Metric, Snapshot, Trajectory, losses
from rodjax.window import REACH, Window, alternating, midpoint, slide, warm_up

Progress = Callable[[Array, Array], None]


def descend(
    dynamics: Dynamics,
    start: PyTree | Window,
    steps: int,
    *,
    lr: PyTree = None,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    project: Callable[[PyTree], PyTree] = lambda params: params,
    progress: Progress | None = None,
) -> Trajectory:
    _check_steps(steps, every)
    if isinstance(start, Window):
        window, lr = start, dynamics.cast(start.at(0).params, lr)
    else:
        window, lr = warm_up(dynamics, start, lr=lr), dynamics.cast(start, lr)
    metrics = (losses(dynamics.loss), *metrics)
    return _descend(dynamics, window, lr, steps, every, metrics, project, progress)


@eqx.filter_jit
def _descend(dynamics, window, lr, steps, every, metrics, project, progress):
    def snapshot(window):
        return Snapshot(
            step=window.step,
            centre=midpoint(window),
            ends=stack(window.at(0).params, window.at(1).params),
            amplitude=optax.tree.norm(alternating(window).params),
        )

    def advance(window):
        def one(_, carry):
            window, alive, count = carry
            new = slide(dynamics, window, lr)
            # Only the newest state can be the first that is not finite.
            ok = alive & _finite(jax.tree.map(lambda x: x[-1], new.states))
            window = optax.tree.where(ok, new, window)
            return window, ok, count + jnp.astype(alive, count.dtype)

        count = jnp.zeros((), jnp.int32)
        ok = jnp.asarray(True)
        window, ok, count = jax.lax.fori_loop(0, every, one, (window, ok, count))
        # The window ends ahead of the step it stands for.
        return window, ok, window.step + REACH + 1, count

    count = steps // every
    return _record(
        window, snapshot, advance, lr, count, every, metrics, project, progress
    )


def integrate(
    flow: Flow,
    start: PyTree | Window,
    steps: int,
    *,
    lr: PyTree = None,
    solver: diffrax.AbstractSolver | None = None,
    substeps: int = 4,
    controller: diffrax.AbstractStepSizeController | None = None,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    project: Callable[[PyTree], PyTree] = lambda params: params,
    key: Array | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    _check_steps(steps, every)
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    params = start.at(0).params if isinstance(start, Window) else start
    return _integrate(
        flow,
        start,
        flow.dynamics.cast(params, lr),
        jax.random.key(0) if key is None else key,
        steps,
        every,
        substeps,
        diffrax.Heun() if solver is None else solver,
        diffrax.ConstantStepSize() if controller is None else controller,
        (losses(flow.dynamics.loss), *metrics),
        project,
        progress,
    )


@eqx.filter_jit
def _integrate(
    flow,
    start,
    lr,
    key,
    steps,
    every,
    substeps,
    solver,
    controller,
    metrics,
    project,
    progress,
):
    dtype = jnp.result_type(float)
    first = start.step if isinstance(start, Window) else jnp.zeros((), dtype)
    y0 = flow.init(start, lr, key)
    big = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y0))).max) ** 0.5
    term = diffrax.ODETerm(flow.vector_field)
    per_step, per_interval = _stages(solver)

    def broken(t, y, args, **kwargs):
        return ~(optax.tree.norm(y) < big)

    def snapshot(moment):
        t, y = moment
        centre, ends = flow.centre(y), flow.ends(y)
        apart = jax.tree.map(lambda e, c: e - c, ends, centre.params)
        count = jax.tree.leaves(ends)[0].shape[0]
        amplitude = optax.tree.norm(apart) / count**0.5
        return Snapshot(t + flow.offset, centre, ends, amplitude)

    def advance(moment):
        t, y = moment
        sol = diffrax.diffeqsolve(
            term,
            solver,
            t0=t,
            t1=t + every,
            dt0=1.0 / substeps,
            y0=y,
            args=lr,
            stepsize_controller=controller,
            event=diffrax.Event(broken),
            max_steps=4096 * every,
            throw=False,
        )
        new = jax.tree.map(lambda x: x[-1], sol.ys)
        ok = (sol.result == diffrax.RESULTS.successful) & ~broken(None, new, None)
        moment = optax.tree.where(ok, (t + every, new), (t, y))
        calls = sol.stats["num_steps"] * per_step + per_interval
        return moment, ok, jnp.ceil(sol.ts[-1]), calls * flow.evaluations

    count = steps // every
    path = _record(
        (first, y0), snapshot, advance, lr, count, every, metrics, project, progress
    )
    return path._replace(final=path.final[1])


def _record(state, snapshot, advance, lr, count, every, metrics, project, progress):
    """Scan `advance` and save a projected snapshot at the start and after each."""

    def save(state, carries, ok):
        seen = snapshot(state)
        values, new = {}, []
        for metric, carry in zip(metrics, carries, strict=True):
            named, carry = metric.update(seen, carry, lr)
            values |= named
            new.append(carry)
        if progress is not None:
            jax.debug.callback(progress, seen.step, values["loss"])
        kept = (project(seen.centre.params), jax.vmap(project)(seen.ends), values)
        kept = jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), kept)
        return kept, tuple(new)

    def body(carry, _):
        state, carries, diverged_at, evaluations = carry
        alive = jnp.isnan(diverged_at)
        new, ok, at, calls = advance(state)
        ok &= alive
        state = optax.tree.where(ok, new, state)
        diverged_at = jnp.where(alive & ~ok, at, diverged_at)
        evaluations += jnp.where(alive, calls, 0)
        saved, carries = save(state, carries, ok)
        return (state, carries, diverged_at, evaluations), saved

    seen = snapshot(state)
    carries = tuple(metric.init(seen, lr) for metric in metrics)
    first, carries = save(state, carries, jnp.asarray(True))
    nan, zero = jnp.full((), jnp.nan, seen.step.dtype), jnp.zeros((), seen.step.dtype)
    (state, _, diverged_at, evaluations), rest = jax.lax.scan(
        body, (state, carries, nan, zero), length=count
    )
    saved = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, rest)
    step_of = seen.step + every * jnp.arange(count + 1, dtype=seen.step.dtype)
    return Trajectory(step_of, *saved, state, evaluations, diverged_at)


def _finite(tree: PyTree) -> Array:
    return jnp.isfinite(optax.tree.norm(tree))


def _stages(solver: diffrax.AbstractSolver) -> tuple[float, float]:
    """Vector-field evaluations per step, and once per solve, of an explicit solver."""
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    if isinstance(solver, diffrax.AbstractERK):
        reused = int(solver.tableau.fsal)
        return solver.tableau.num_stages - reused, reused
    return jnp.nan, 0


def _check_steps(steps: int, every: int) -> None:
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if steps < 1 or steps % every:
        raise ValueError(
            f"steps must be a positive multiple of every ({every}), got {steps}"
        )
