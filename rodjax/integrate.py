"""A flow solved with diffrax, and the optimizer itself, as the same Trajectory."""

from collections.abc import Callable, Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.dynamics import Dynamics
from rodjax.flows.base import Flow, stack
from rodjax.trajectory import (
    Advance,
    Metric,
    Progress,
    Recorder,
    Snapshot,
    Trajectory,
)
from rodjax.window import REACH, Window, alternating, midpoint, slide, warm_up


def everything(params: PyTree) -> PyTree:
    """The default projection: save all parameters."""
    return params


def descend(
    dynamics: Dynamics,
    start: PyTree | Window,
    steps: int,
    *,
    lr: PyTree = None,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    project: Callable[[PyTree], PyTree] = everything,
    progress: Progress | None = None,
) -> Trajectory:
    """Run the optimizer itself, by `lax.scan` over its update map.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`.
    - `start`: initial parameters, or a `Window` (from `warm_up`) to go on from.
    - `steps`: optimizer steps, a multiple of `every`.
    - `lr`: the learning rate if `dynamics` takes one: data, so it may be vmapped.
    - `every`: save every so many steps, to bound memory.
    - `metrics`: recorded beside the loss, such as `edge_of_stability(dynamics)`.
    - `project`: what to keep of the parameters, any function of them (linear, if the
      saved values are to be averaged or compared); `lambda p: None` keeps nothing.
    - `progress`: called on the host with the step and the loss at every saved moment.

    **Returns** a `Trajectory` over the second-order midpoints at `steps / every + 1`
    moments; the iterates are its `ends`.

    **Raises** `ValueError` on a `steps` that is not a positive multiple of `every`, and
    what `rodjax.dynamics` says of parameters, loss and `lr`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * w**2)
    >>> run = rj.descend(sgd, jnp.array(8.0), steps=3, lr=1.5)
    >>> run.ends[:, 0].tolist()
    [8.0, -4.0, 2.0, -1.0]

    ```
    """
    recorder = _recorder(dynamics, steps, every, metrics, project, progress)
    if isinstance(start, Window):
        window, lr = start, dynamics.cast(start.at(0).params, lr)
    else:
        window, lr = warm_up(dynamics, start, lr=lr), dynamics.cast(start, lr)
    return _descend(dynamics, window, lr, recorder)


@eqx.filter_jit
def _descend(
    dynamics: Dynamics, window: Window, lr: PyTree, recorder: Recorder
) -> Trajectory:
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
        window, ok, calls = jax.lax.fori_loop(0, recorder.every, one, before)
        return Advance(window, ok, window.step + REACH + 1, calls)

    return recorder.record(window, snapshot, advance, lr)


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
    project: Callable[[PyTree], PyTree] = everything,
    key: Array | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Solve a flow with diffrax, saving at whole optimizer steps.

    The function compiles once for a flow and shapes; `lr` is data, so a grid of
    learning rates goes through one compilation, in a loop or under `jax.vmap`.

    **Arguments**

    - `flow`: from `rodjax.flows`; build it once and keep it, since a new one compiles
      anew.
    - `start`: parameters, for a flow from scratch, or a `Window` of a run.
    - `steps`, `every`, `metrics`, `project`, `progress`: as for `descend`.
    - `lr`: the learning rate if the flow's dynamics take one.
    - `solver`: any diffrax solver of ODEs; Heun by default.
    - `substeps`: solver steps to an optimizer step; 4 is safe with Heun.
    - `controller`: a diffrax step size controller; constant steps by default.
      An adaptive one starts afresh at every saved moment.
    - `key`: of what the flow draws at random; `jax.random.key(0)` if `None`.

    **Returns** a `Trajectory`. A lane whose state stops being finite (or outgrows the
    square root of the largest float, or whose controller gives up) is frozen and says
    so in `diverged_at`; others go on.

    **Raises** `ValueError` on `substeps` below 1, on a `steps` that is not a positive
    multiple of `every`, and what the flow and its dynamics say of their arguments.

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> flow = rj.flows.modulated(sgd)
    >>> solve = lambda lr: rj.integrate(flow, jnp.ones(2), steps=5, lr=lr)
    >>> paths = jax.vmap(solve)(jnp.array([0.1, 0.2, 0.3]))
    >>> paths.metrics["loss"].shape
    (3, 6)

    ```
    """
    recorder = _recorder(flow.dynamics, steps, every, metrics, project, progress)
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    params = start.at(0).params if isinstance(start, Window) else start
    return _integrate(
        flow,
        start,
        flow.dynamics.cast(params, lr),
        jax.random.key(0) if key is None else key,
        recorder,
        substeps,
        diffrax.Heun() if solver is None else solver,
        diffrax.ConstantStepSize() if controller is None else controller,
    )


@eqx.filter_jit
def _integrate(
    flow: Flow,
    start: PyTree | Window,
    lr: PyTree,
    key: Array,
    recorder: Recorder,
    substeps: int,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
) -> Trajectory:
    first = start.step if isinstance(start, Window) else jnp.asarray(0.0)
    y0 = flow.init(start, lr, key)
    big = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(y0))).max) ** 0.5
    per_step, per_solve = _stages(solver)

    def unbounded(y) -> Array:
        return ~(optax.tree.norm(y) < big)

    def snapshot(moment) -> Snapshot:
        t, y = moment
        centre, (ends, report) = flow.centre(y), flow.observe(y, lr)
        apart = jax.tree.map(lambda e, c: e - c[None], ends, centre.params)
        count = jax.tree.leaves(ends)[0].shape[0]
        amplitude = optax.tree.norm(apart) / count**0.5
        return Snapshot(t + flow.offset, centre, ends, amplitude, report)

    def advance(moment) -> Advance:
        t, y = moment
        # Time in the state's own dtype, which the solver would promote otherwise.
        span = jnp.asarray(recorder.every, jnp.result_type(*jax.tree.leaves(y)))
        local = jnp.zeros_like(span)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda s, y, lr: flow.vector_field(t + s, y, lr)),
            solver,
            t0=local,
            t1=span,
            dt0=jnp.full_like(span, 1.0 / substeps),
            y0=y,
            args=lr,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=controller,
            event=diffrax.Event(lambda t, y, args, **_: unbounded(y)),
            max_steps=recorder.every * max(4096, substeps),
            throw=False,
        )
        end, new = jax.tree.map(lambda x: x[-1], (solution.ts, solution.ys))
        ok = (solution.result == diffrax.RESULTS.successful) & ~unbounded(new)
        calls = solution.stats["num_steps"] * per_step + per_solve
        calls = jnp.astype(calls * flow.evaluations, t.dtype)
        stopped = jnp.ceil(t + jnp.astype(end, t.dtype))
        return Advance((t + recorder.every, new), ok, stopped, calls)

    path = recorder.record((first, y0), snapshot, advance, lr)
    return path._replace(final=path.final[1])


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


def _recorder(
    dynamics: Dynamics,
    steps: int,
    every: int,
    metrics: Sequence[Metric],
    project: Callable[[PyTree], PyTree],
    progress: Progress | None,
) -> Recorder:
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if steps < 1 or steps % every:
        raise ValueError(
            f"steps must be a positive multiple of every={every}, got {steps}"
        )
    return Recorder(
        dynamics.loss, steps // every, every, tuple(metrics), project, progress
    )
