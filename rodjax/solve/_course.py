"""The optimizer itself and a flow under diffrax, each from one saved moment on."""

import math
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
from rodjax.solve import _stretch as together
from rodjax.solve._effort import controlled, spent
from rodjax.solve._heun import Heun
from rodjax.solve._method import Method
from rodjax.solve._trajectory import Reached, Snapshot

# Of a controller that adapts: solver steps to an optimizer step at most, and on average
# over many, for a derivative in reverse keeps some of them.
PATIENCE, USUAL = 4096, 256


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
      evaluations spent. `go`, the same in all lanes of a vmap, is for one branch around
      all of it: at one in every step a GPU would wait for the host.
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
        never, none = jnp.full_like(run.lost_at, jnp.inf), jnp.zeros_like(run.lost_at)
        return jax.lax.cond(go, steps, lambda run, _: (run, never, none), run, alive)

    def steps(run: Following, alive: ArrayLike) -> tuple[Following, Array, Array]:
        def one(_: Any, carry: tuple[Following, State, Array]):
            run, newest, calls = carry
            going = jnp.isinf(run.lost_at) & alive
            new = dynamics.update(hidden(newest, going), lr=lr)
            # Other leaves may be infinite in good health, as of a line search at first.
            ok = _finite(new.params)
            this = run.states.step + REACH + 1
            lost_at = jnp.where(going & ~ok, this, run.lost_at)
            states, newest = push(run.states, new, going & ok)
            return Following(states, lost_at), newest, calls + going

        before = run, run.states.at(REACH), jnp.zeros_like(run.lost_at)
        run, _, calls = jax.lax.fori_loop(0, every, one, before)
        # What a window begins with and has lost is seen where it is left.
        return run, run.lost_at, calls

    leave = lambda run: unrolled(run.states)
    return Course(look, advance, enter, leave, dynamics.loss, lr)


def begun(flow: Flow, start: PyTree | Window, lr: PyTree, key: Array) -> Reached:
    """A flow at its start."""
    time = start.step if isinstance(start, Window) else 0.0
    return Reached(jnp.asarray(time, float), flow.init(start, lr=lr, key=key))


def solution(
    flow: Flow, lr: PyTree, every: int, method: Method, count: int = 1
) -> Course:
    """A flow solved `count` saved moments at a time, from a `Reached`.

    **Raises** `ValueError` for constant steps that are longer than those together.
    """
    how = method.of(flow)
    solver, longest = how.solver, 1 / how.substeps
    if method.constant() and longest > every * count:
        raise ValueError(
            f"substeps={how.substeps:g} are steps of {longest:g}, longer than from "
            f"one saved moment to the next: give every={math.ceil(longest)} or more"
        )
    # Which keeps nothing to interpolate with.
    solver = diffrax.Heun() if count > 1 and isinstance(solver, Heun) else solver
    # One more where steps that fill the span exactly are rounded to a little less.
    most = math.ceil(every * count * how.substeps) + 1
    if not method.constant():
        most = max(every * max(PATIENCE, count * USUAL), most)

    @jax.jit
    def vector_field(*args: Any) -> PyTree:
        # The solver asks for the field several times: so it is traced once for all.
        return how.field(*args)

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
        return jax.lax.cond(go, one, lambda at, _: (at, never, none), at, alive)

    def one(at: Reached, alive: ArrayLike) -> tuple[Reached, Array, Array]:
        *found, calls = solve(at, alive)
        new, lost_at = jax.tree.map(lambda x: x[0], tuple(found))
        at = optax.tree.where(jnp.isinf(lost_at) & alive, new, at)
        return at, lost_at, calls

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

        def centre(leaves: list[Array]) -> State:
            return flow.centre(structure.unflatten(leaves))

        def norm(error: list[Array]) -> Array:
            return flow.error_norm(structure.unflatten(error))

        def field(s: Any, leaves: list[Array], lr: PyTree) -> list[Array]:
            slope = vector_field(t + s, back(leaves), lr)
            return [jnp.astype(x, wide) for x in jax.tree.leaves(slope)]

        # Python's numbers, for diffrax checks arrays on the host, where no program for
        # another device gets to; but in the state's own dtype, which it would promote.
        usual = wide == jnp.result_type(float)
        time = lambda t: float(t) if usual else np.asarray(t, wide)
        moments = every * np.arange(1, count + 1)
        saved = [diffrax.SubSaveAt(t1=True)]
        if count > 1:
            saved.append(diffrax.SubSaveAt(ts=jnp.asarray(moments, wide)))
        solved: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            t0=time(0),
            t1=time(every * count),
            dt0=time(1 / how.substeps),
            y0=[jnp.astype(x, wide) for x in leaves],
            args=lr,
            saveat=diffrax.SaveAt(subs=saved, controller_state=True),
            stepsize_controller=controlled(method.stepsize_controller, solver, norm),
            adjoint=method.adjoint,
            # Of the parameters alone, which all that is lost gets to in a step.
            event=diffrax.Event(lambda t, y, args, **_: unbounded(centre(y).params)),
            max_steps=most,
            throw=False,
        )
        # Of those before the end, wherever that was.
        end = solved.ts[0][-1]
        found = jax.vmap(back)(solved.ys[-1])
        reached = (solved.result == diffrax.RESULTS.successful) | (moments < end)
        ok = reached & ~jax.vmap(unbounded)(found)
        stopped = jnp.ceil(t + jnp.astype(end, t.dtype))
        calls = jnp.astype(spent(solver, solved) * flow.evaluations, t.dtype)
        ahead = Reached(t + jnp.astype(moments, t.dtype), found)
        return ahead, jnp.where(ok, jnp.inf, stopped), calls

    itself = lambda at: at
    course = Course(look, advance, itself, itself, flow.dynamics.loss, lr, flow.reports)
    if count == 1:
        return course
    return course._replace(
        look=lambda stretch, alive: look(stretch.now, alive),
        advance=partial(together.advance, solve),
        enter=partial(together.enter, count=count),
        leave=lambda stretch: stretch.now,
    )


def hidden(tree: PyTree, shown: ArrayLike) -> PyTree:
    """`tree` with NaN for its floats unless `shown`."""
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    hide = lambda x: jnp.where(shown, x, jnp.nan) if floats(x) else x
    return jax.tree.map(hide, tree)


def _finite(tree: PyTree) -> Array:
    """Whether all numbers are finite.

    By products with the least number, NaN or infinite if one of a row is, and in no
    case else: on a CPU in a fraction of the time that it takes to ask them one by one.
    """

    def rows(x: Array) -> Array:
        x = jax.lax.stop_gradient(x)
        if x.ndim < 2:
            return x
        return x @ jnp.full(x.shape[-1], jnp.finfo(x.dtype).tiny, x.dtype)

    leaves = jax.tree.leaves(tree)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(rows(x))) for x in leaves]))
