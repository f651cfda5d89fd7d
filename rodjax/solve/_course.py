"""The optimizer itself and a flow under diffrax, each from one saved moment on."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from rodjax.flows import Flow, stack
from rodjax.linalg import length
from rodjax.optimizer import (
    REACH,
    Dynamics,
    Loss,
    Window,
    alternating,
    midpoint,
    slide,
    widest,
)
from rodjax.solve._trajectory import Reached, Snapshot

# Of a controller that adapts: solver steps to an optimizer step at most.
PATIENCE = 4096
ADJOINTS = (
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.ForwardMode,
)


class Course(NamedTuple):
    """How one run or one flow is followed, from one saved moment to the next.

    - `look(state) -> Snapshot`.
    - `advance(state) -> (state, lost_at, calls)`: the state at the next moment, the
      last finite one if it is lost; the step at which it was, infinite if it was not;
      and the update-map evaluations spent.
    - `loss(params)`, `lr`: what divergence is judged by, and metrics are to be told.
    - `reports`: name -> long name of what a snapshot's report holds.
    """

    look: Callable[[Any], Snapshot]
    advance: Callable[[Any], tuple[Any, Array, Array]]
    loss: Loss
    lr: PyTree
    reports: Mapping[str, str] = MappingProxyType({})


class Method(NamedTuple):
    """How a flow is solved: `substeps` solver steps to an optimizer step."""

    solver: diffrax.AbstractSolver
    substeps: int
    stepsize_controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint


def solving(
    solver: diffrax.AbstractSolver | None = None,
    substeps: int = 4,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Method:
    """Heun, constant steps and the checkpointed adjoint where `None`.

    **Raises** `ValueError` or `TypeError`, naming the argument, for what cannot solve a
    flow.
    """
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    solver = diffrax.Heun() if solver is None else solver
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"solver must be a diffrax solver, such as Heun(); got {solver}"
        )
    if solver.term_structure not in (diffrax.AbstractTerm, diffrax.ODETerm):
        raise ValueError(
            f"solver {type(solver).__name__} is for vector fields in several parts or "
            "with noise, and a flow is one: give a solver of ODEs, such as Heun(), "
            "Tsit5() or Kvaerno5()"
        )
    if stepsize_controller is None:
        stepsize_controller = diffrax.ConstantStepSize()
    tolerance = getattr(getattr(solver, "root_finder", None), "rtol", 0.0)
    constant = isinstance(stepsize_controller, diffrax.ConstantStepSize)
    if constant and not isinstance(tolerance, int | float):
        raise ValueError(
            f"solver {type(solver).__name__} is implicit, and constant steps do not "
            "say how accurately to solve for one: give stepsize_controller=diffrax."
            "PIDController(rtol=1e-6, atol=1e-9), or a root finder with tolerances"
        )
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, ADJOINTS):
        raise ValueError(
            f"adjoint {type(adjoint).__name__} gives wrong derivatives of a flow, "
            "which cannot be solved backwards: give RecursiveCheckpointAdjoint(), "
            "DirectAdjoint() or, for jax.jvp and jax.jacfwd, ForwardMode()"
        )
    return Method(solver, substeps, stepsize_controller, adjoint)


def descent(dynamics: Dynamics, lr: PyTree, every: int) -> Course:
    """The optimizer itself; its state is a `Window`."""

    def look(window: Window) -> Snapshot:
        return Snapshot(
            step=jnp.astype(window.step, float),
            centre=midpoint(window),
            ends=stack(window.at(0).params, window.at(1).params),
            amplitude=length(alternating(window).params),
            report={},
        )

    def advance(window: Window) -> tuple[Window, Array, Array]:
        def one(_, carry):
            window, ok, calls = carry
            new = slide(dynamics, window, lr=lr)
            calls += jnp.astype(ok, calls.dtype)
            # Only the newest state can be the first that is not finite.
            ok &= _finite(new.at(REACH).params)
            return optax.tree.where(ok, new, window), ok, calls

        # Other leaves may be infinite in good health, as of a line search at first.
        found = jax.vmap(_finite)(window.states.params)
        before = (window, jnp.all(found), jnp.zeros(()))
        window, ok, calls = jax.lax.fori_loop(0, every, one, before)
        # After the window, or within one that began so.
        lost = jnp.where(jnp.all(found), 2 * REACH + 1, jnp.argmin(found))
        return window, jnp.where(ok, jnp.inf, window.step - REACH + lost), calls

    return Course(look, advance, dynamics.loss, lr)


def begun(flow: Flow, start: PyTree | Window, lr: PyTree, key: Array) -> Reached:
    """A flow at its start."""
    time = start.step if isinstance(start, Window) else 0.0
    return Reached(jnp.asarray(time, float), flow.init(start, lr=lr, key=key))


def solution(flow: Flow, lr: PyTree, every: int, method: Method) -> Course:
    """A flow solved from one saved moment to the next; its state is a `Reached`."""
    per_step, per_solve = _stages(method.solver)
    constant = isinstance(method.stepsize_controller, diffrax.ConstantStepSize)
    # One more where steps that fill the span exactly are rounded to a little less.
    most = every * (method.substeps if constant else max(PATIENCE, method.substeps)) + 1

    @jax.jit
    def vector_field(*args: Any) -> PyTree:
        # The solver asks for the field several times: so it is traced once for all.
        return flow.vector_field(*args)

    def unbounded(y: PyTree) -> Array:
        big = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y))).max) ** 0.5
        return ~(optax.tree.norm(y) < big)

    def look(at: Reached) -> Snapshot:
        y = at.state
        centre, (ends, report) = flow.centre(y), flow.observe(y, lr=lr)
        apart = jax.tree.map(lambda e, c: e - c[None], ends, centre.params)
        count = jax.tree.leaves(ends)[0].shape[0]
        amplitude = length(apart) / count**0.5
        return Snapshot(at.time + flow.offset, centre, ends, amplitude, report)

    def advance(at: Reached) -> tuple[Reached, Array, Array]:
        t, y = at
        # As a list, and in one dtype: diffrax promotes several to one for good, and
        # stumbles over an empty tuple. No narrower than single precision, which adds
        # up what half a one would lose.
        leaves, structure = jax.tree.flatten(y)
        wide = widest(leaves)
        narrow = [x.dtype for x in leaves]

        def back(leaves: list[Array]) -> PyTree:
            return structure.unflatten(map(jnp.astype, leaves, narrow))

        def field(s: Any, leaves: list[Array], lr: PyTree) -> list[Array]:
            slope = vector_field(t + s, back(leaves), lr)
            return [jnp.astype(x, wide) for x in jax.tree.leaves(slope)]

        # Python's numbers, for diffrax checks arrays on the host, where no program for
        # another device gets to; but in the state's own dtype, which it would promote.
        usual = wide == jnp.result_type(float)
        time = lambda t: float(t) if usual else np.asarray(t, wide)
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            method.solver,
            t0=time(0),
            t1=time(every),
            dt0=time(1 / method.substeps),
            y0=[jnp.astype(x, wide) for x in leaves],
            args=lr,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=method.stepsize_controller,
            adjoint=method.adjoint,
            event=diffrax.Event(lambda t, y, args, **_: unbounded(y)),
            max_steps=most,
            throw=False,
        )
        end, ends = jax.tree.map(lambda x: x[-1], (solved.ts, solved.ys))
        new = back(ends)
        ok = (solved.result == diffrax.RESULTS.successful) & ~unbounded(new)
        calls = solved.stats["num_steps"] * per_step + per_solve
        calls = jnp.astype(calls * flow.evaluations, t.dtype)
        stopped = jnp.ceil(t + jnp.astype(end, t.dtype))
        return Reached(t + every, new), jnp.where(ok, jnp.inf, stopped), calls

    return Course(look, advance, flow.dynamics.loss, lr, flow.reports)


def _finite(tree: PyTree) -> Array:
    leaves = jax.tree.leaves(tree)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _stages(solver: diffrax.AbstractSolver) -> tuple[float, float]:
    """Vector-field evaluations of an explicit solver: per step, and once per solve."""
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    tableau = getattr(solver, "tableau", None)
    explicit = isinstance(solver, diffrax.AbstractERK)
    if explicit and isinstance(tableau, diffrax.ButcherTableau):
        reused = int(tableau.fsal)
        return tableau.num_stages - reused, reused
    return float("nan"), 0
