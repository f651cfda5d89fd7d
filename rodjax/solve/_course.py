"""The optimizer itself and a flow under diffrax, each from one saved moment on."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from rodjax.flows import Flow, stack
from rodjax.linalg import length
from rodjax.optimizer import (
    REACH,
    Dynamics,
    Loss,
    Ring,
    State,
    Window,
    alternating,
    midpoint,
    push,
    ring,
    unrolled,
    widest,
)
from rodjax.solve._heun import Heun
from rodjax.solve._trajectory import Reached, Snapshot

# Of a controller that adapts: solver steps to an optimizer step at most.
PATIENCE = 4096
ADJOINTS = (
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.ForwardMode,
)


class Following(NamedTuple):
    """A run under way.

    - `states`: the seven about the present moment.
    - `lost_at`: the first step that was not finite, infinite so far, [].
    """

    states: Ring
    lost_at: Array


class Course(NamedTuple):
    """How one run or one flow is followed, from one saved moment to the next.

    - `look(state, alive) -> Snapshot`, of NaN unless `alive`: inner iterations stop at
      NaN, whereas the last finite state of a lane that is lost may need many, for which
      all lanes of a vmap would wait.
    - `advance(state, alive, go) -> (state, lost_at, calls)`: the state at the next
      moment, or at this one unless `go`; the last finite one if it is lost or not
      `alive`; the step at which it was, infinite if it was not; and the update-map
      evaluations spent. `go`, the same in all lanes of a vmap, is told to it, for XLA
      copies what a branch around all of it would hand on.
    - `enter(start) -> state`, `leave(state) -> final`: what is followed, of where it
      starts from, and back.
    - `loss(params)`, `lr`: what divergence is judged by, and metrics are to be told.
    - `reports`: name -> long name of what a snapshot's report holds.
    """

    look: Callable[[Any, ArrayLike], Snapshot]
    advance: Callable[[Any, ArrayLike, ArrayLike], tuple[Any, Array, Array]]
    enter: Callable[[Any], Any]
    leave: Callable[[Any], Any]
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
    # Heun's own in the form that takes less memory.
    if solver is None or type(solver) is diffrax.Heun:
        solver = Heun()
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
    """The optimizer itself, from a `Window`."""

    def enter(window: Window) -> Following:
        found = jax.vmap(_finite)(window.states.params)
        # Within the window, if it began so.
        first = window.step - REACH + jnp.argmin(found)
        return Following(ring(window), jnp.where(jnp.all(found), jnp.inf, first))

    def look(run: Following, alive: ArrayLike) -> Snapshot:
        states = run.states
        # Hidden before its norm: all that XLA takes into a reduction on a CPU, numbers
        # included, it has in arrays of their own, and what is selected it does not.
        apart = hidden(alternating(states).params, alive)
        seen = Snapshot(
            step=jnp.astype(states.step, float),
            centre=midpoint(states),
            ends=stack(states.at(0).params, states.at(1).params),
            amplitude=length(apart),
            report={},
        )
        return hidden(seen, alive)

    def advance(
        run: Following, alive: ArrayLike, go: ArrayLike
    ) -> tuple[Following, Array, Array]:
        def one(_: Any, carry: tuple[Following, State, Array]):
            run, newest, calls = carry
            going = alive & jnp.isinf(run.lost_at) & go
            update = partial(dynamics.update, lr=lr)
            new = jax.lax.cond(go, update, optax.tree.zeros_like, newest)
            # Other leaves may be infinite in good health, as of a line search at first.
            # Parameters that are not finite stay so: what follows need not be held.
            ok = _finite(new.params)
            this = run.states.step + REACH + 1
            lost_at = jnp.where(going & ~ok, this, run.lost_at)
            states = push(run.states, new, going & ok, go)
            return Following(states, lost_at), new, calls + going

        newest = hidden(run.states.at(REACH), alive)
        before = run, newest, jnp.zeros((), run.lost_at.dtype)
        run, _, calls = jax.lax.fori_loop(0, every, one, before)
        # What a window begins with and has lost is seen where it is left.
        return run, jnp.where(go, run.lost_at, jnp.inf), calls

    leave = lambda run: unrolled(run.states)
    return Course(look, advance, enter, leave, dynamics.loss, lr)


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

    def look(at: Reached, alive: ArrayLike) -> Snapshot:
        at = hidden(at, alive)
        y = at.state
        centre, (ends, report) = flow.centre(y), flow.observe(y, lr=lr)
        apart = jax.tree.map(lambda e, c: e - c[None], ends, centre.params)
        count = jax.tree.leaves(ends)[0].shape[0]
        amplitude = length(apart) / count**0.5
        return Snapshot(at.time + flow.offset, centre, ends, amplitude, report)

    def advance(
        at: Reached, alive: ArrayLike, go: ArrayLike
    ) -> tuple[Reached, Array, Array]:
        never, none = jnp.full_like(at.time, jnp.inf), jnp.zeros_like(at.time)
        return jax.lax.cond(go, solve, lambda at, _: (at, never, none), at, alive)

    def solve(at: Reached, alive: ArrayLike) -> tuple[Reached, Array, Array]:
        t, y = hidden(at, alive)
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
        reached = optax.tree.where(ok & alive, Reached(t + every, new), at)
        return reached, jnp.where(ok, jnp.inf, stopped), calls

    itself = lambda at: at
    return Course(look, advance, itself, itself, flow.dynamics.loss, lr, flow.reports)


def hidden(tree: PyTree, shown: ArrayLike) -> PyTree:
    """`tree` with NaN for its floats unless `shown`."""
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    hide = lambda x: jnp.where(shown, x, jnp.nan) if floats(x) else x
    return jax.tree.map(hide, tree)


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
