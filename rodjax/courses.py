"""The optimizer itself and a flow under diffrax, each as a course to follow."""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.dynamics import Dynamics
from rodjax.flows.base import Flow, stack
from rodjax.trajectory import Advance, Course, Snapshot
from rodjax.window import REACH, Window, alternating, midpoint, slide


class Method(NamedTuple):
    """How a flow is solved: `substeps` solver steps to an optimizer step."""

    solver: diffrax.AbstractSolver
    substeps: int
    controller: diffrax.AbstractStepSizeController


def solving(
    solver: diffrax.AbstractSolver | None,
    substeps: int,
    controller: diffrax.AbstractStepSizeController | None,
) -> Method:
    """Heun and constant steps where `None`; `ValueError` on `substeps` below 1."""
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    return Method(
        diffrax.Heun() if solver is None else solver,
        substeps,
        diffrax.ConstantStepSize() if controller is None else controller,
    )


def descent(dynamics: Dynamics, lr: PyTree, every: int) -> Course:
    """The optimizer itself; its state is a `Window`."""

    def snapshot(window: Window) -> Snapshot:
        return Snapshot(
            step=window.step,
            centre=midpoint(window),
            ends=stack(window.at(0).params, window.at(1).params),
            amplitude=optax.tree.norm(alternating(window).params),
            report={},
        )

    def advance(window: Window) -> Advance:
        def one(_, carry):
            window, ok, calls = carry
            new = slide(dynamics, window, lr)
            calls += jnp.astype(ok, calls.dtype)
            # Only the newest state can be the first that is not finite.
            ok &= _finite(new.at(REACH))
            return optax.tree.where(ok, new, window), ok, calls

        before = (window, _finite(window.states), jnp.zeros_like(window.step))
        window, ok, calls = jax.lax.fori_loop(0, every, one, before)
        return Advance(window, ok, window.step + REACH + 1, calls)

    return Course(snapshot, advance, lr)


def at_start(
    flow: Flow, start: PyTree | Window, lr: PyTree, key: Array
) -> tuple[Array, PyTree]:
    """The state of a flow's course at its start: the time, and the flow's state."""
    first = start.step if isinstance(start, Window) else jnp.asarray(0.0)
    return first, flow.init(start, lr, key)


def solution(flow: Flow, lr: PyTree, every: int, method: Method) -> Course:
    """A flow solved from one saved moment to the next."""
    per_step, per_solve = _stages(method.solver)

    def unbounded(y: PyTree) -> Array:
        big = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).max) ** 0.5
        return ~(optax.tree.norm(y) < big)

    def snapshot(moment: tuple[Array, PyTree]) -> Snapshot:
        t, y = moment
        centre, (ends, report) = flow.centre(y), flow.observe(y, lr)
        apart = jax.tree.map(lambda e, c: e - c[None], ends, centre.params)
        count = jax.tree.leaves(ends)[0].shape[0]
        amplitude = optax.tree.norm(apart) / count**0.5
        return Snapshot(t + flow.offset, centre, ends, amplitude, report)

    def advance(moment: tuple[Array, PyTree]) -> Advance:
        t, y = moment
        # Time in the state's own dtype, which the solver would promote otherwise.
        span = jnp.asarray(every, jnp.result_type(*jax.tree.leaves(y)))
        local = jnp.zeros_like(span)
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda s, y, lr: flow.vector_field(t + s, y, lr)),
            method.solver,
            t0=local,
            t1=span,
            dt0=jnp.full_like(span, 1.0 / method.substeps),
            y0=y,
            args=lr,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=method.controller,
            event=diffrax.Event(lambda t, y, args, **_: unbounded(y)),
            max_steps=every * max(4096, method.substeps),
            throw=False,
        )
        end, new = jax.tree.map(lambda x: x[-1], (solved.ts, solved.ys))
        ok = (solved.result == diffrax.RESULTS.successful) & ~unbounded(new)
        calls = solved.stats["num_steps"] * per_step + per_solve
        calls = jnp.astype(calls * flow.evaluations, t.dtype)
        stopped = jnp.ceil(t + jnp.astype(end, t.dtype))
        return Advance((t + every, new), ok, stopped, calls)

    return Course(snapshot, advance, lr)


def _finite(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _stages(solver: diffrax.AbstractSolver) -> tuple[float, float]:
    """Vector-field evaluations of an explicit solver: per step, and once per solve."""
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    if isinstance(solver, diffrax.AbstractERK):
        tableau = solver.tableau
        assert isinstance(tableau, diffrax.ButcherTableau)
        reused = int(tableau.fsal)
        return tableau.num_stages - reused, reused
    return float("nan"), 0
