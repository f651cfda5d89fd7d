"""A flow solved with diffrax, and the optimizer itself, as the same Trajectory."""

from collections.abc import Callable, Sequence

import diffrax
import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from rodjax.courses import Method, at_start, descent, solution, solving
from rodjax.dynamics import Dynamics
from rodjax.flows.base import Flow
from rodjax.trajectory import Metric, Progress, Recorder, Trajectory
from rodjax.window import Window, warm_up


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
    moments = saved_moments(steps, every)
    recorder = Recorder(dynamics.loss, tuple(metrics), project, progress)
    if isinstance(start, Window):
        window, lr = start, dynamics.cast(start.at(0).params, lr)
    else:
        window, lr = warm_up(dynamics, start, lr=lr), dynamics.cast(start, lr)
    return _descend(dynamics, window, lr, recorder, moments, every)


@eqx.filter_jit
def _descend(
    dynamics: Dynamics,
    window: Window,
    lr: PyTree,
    recorder: Recorder,
    moments: int,
    every: int,
) -> Trajectory:
    return recorder.record(descent(dynamics, lr, every), window, moments, every)


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
    moments = saved_moments(steps, every)
    recorder = Recorder(flow.dynamics.loss, tuple(metrics), project, progress)
    method = solving(solver, substeps, controller)
    params = start.at(0).params if isinstance(start, Window) else start
    lr = flow.dynamics.cast(params, lr)
    key = jax.random.key(0) if key is None else key
    return _integrate(flow, start, lr, key, recorder, moments, every, method)


@eqx.filter_jit
def _integrate(
    flow: Flow,
    start: PyTree | Window,
    lr: PyTree,
    key: Array,
    recorder: Recorder,
    moments: int,
    every: int,
    method: Method,
) -> Trajectory:
    course = solution(flow, lr, every, method)
    path = recorder.record(course, at_start(flow, start, lr, key), moments, every)
    return path._replace(final=path.final[1])


def saved_moments(steps: int, every: int) -> int:
    """The moments saved after the first. Raises `ValueError` if they do not fit."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if steps < 1 or steps % every:
        raise ValueError(
            f"steps must be a positive multiple of every={every}, got {steps}"
        )
    return steps // every
