"""A flow solved with diffrax, and the optimizer itself, as the same Trajectory."""

from collections.abc import Callable, Sequence
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PyTree

from rodjax.flows import Flow
from rodjax.optimizer import Dynamics, Window, compiled, warm_up
from rodjax.solve._course import begun, descent, solution
from rodjax.solve._method import Method, solving
from rodjax.solve._metrics import losses
from rodjax.solve._record import record
from rodjax.solve._trajectory import Metric, Progress, Reached, Trajectory

SECOND = (
    "the loss has no second derivatives, which this flow or metric needs (products "
    "with the Hessian, forwards over reverse): it is, or calls, a jax.custom_vjp or a "
    "callback. Give it a jax.custom_jvp, or take a flow of first derivatives alone: "
    "gradient, stable, rod, and modulated from parameters or without momentum"
)
FORWARD = (
    "integrate is differentiated in forward mode (jax.jvp, jax.jacfwd), which the "
    "default adjoint does not serve: give adjoint=diffrax.ForwardMode()"
)
# What JAX says of both.
UNDIFFERENTIABLE = "forward-mode", "Pure callbacks do not support"

# How many times its start's norm and loss a trajectory may come to before it counts as
# diverged.
LIMIT = 1e3


def everything(params: PyTree) -> PyTree:
    """All of the parameters: what a trajectory keeps of them by default."""
    return params


def descend(
    dynamics: Dynamics,
    start: PyTree | Window,
    steps: int,
    *,
    lr: PyTree = None,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    keep: Callable[[PyTree], PyTree] = everything,
    progress: Progress | None = None,
    limit: float = LIMIT,
    origin: PyTree = None,
) -> Trajectory:
    """Run the optimizer itself, by `lax.scan` over its update map.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`.
    - `start`: initial parameters: the optimizer's state is then a new one, its
      schedules at their beginning. Or a `Window` to go on from: of `warm_up`, the
      `final` of a run, or what `rodjax.training.window` (or `Window.of`) makes of a
      checkpoint, parameters and optimizer state, of a training loop.
    - `steps`: optimizer steps, a multiple of `every`.
    - `lr`: the learning rate if `dynamics` takes one: data, so it may be vmapped.
    - `every`: save every so many steps, to bound memory.
    - `metrics`: recorded beside the loss, such as `edge_of_stability(dynamics)`.
    - `keep`: what to keep of the parameters, any function of them (linear, if the saved
      values are to be averaged or compared); `lambda p: None` keeps nothing.
    - `progress`: called on the host with the step and the loss, at most a hundred
      times, the last moment among them.
    - `limit`: it has diverged at the first saved moment at which both the norm of the
      parameters and the size of the loss are more than `limit` times what they are at
      `origin`, or at the first step that is not finite; infinite for the latter alone.
    - `origin`: parameters, by default those at the start of this trajectory. Where it
      goes on from another, give what that one began with, or what had left by then
      counts as at home.

    **Returns** a `Trajectory` over the second-order midpoints at `steps / every + 1`
    moments; the iterates are its `ends`. It is differentiable in `lr` and `start`,
    forwards and in reverse.

    **Memory**, beyond the gradient's own: 4 copies of the parameters without momentum,
    5 with Adam, whatever `steps` is; the window that it begins with, the one that it
    ends with (seven states each) and what `keep` keeps are beside that.

    **Raises** `ValueError` on a `steps` that is not a positive multiple of `every`, on
    metrics that record the same name, and what `rodjax.dynamics` says of parameters,
    loss and `lr`; `TypeError` if `start` is the `final` of a flow.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * w**2)
    >>> run = rj.descend(sgd, jnp.array(8.0), steps=3, lr=1.5)
    >>> run.ends[:, 0].tolist()
    [8.0, -4.0, 2.0, -1.0]

    ```
    """
    moments = saved_moments(steps, every)
    window, lr = opened(dynamics, start, lr)
    every_metric = (losses(dynamics.loss), *metrics)
    origin = jax.tree.map(jnp.asarray, origin)
    recorded = every_metric, keep, progress, moments, every, limit, origin
    return _descend(dynamics, window, lr, *recorded)


@compiled
def _descend(
    dynamics: Dynamics,
    window: Window,
    lr: PyTree,
    metrics: tuple[Metric, ...],
    keep: Callable[[PyTree], PyTree],
    progress: Progress | None,
    moments: int,
    every: int,
    limit: float,
    origin: PyTree,
) -> Trajectory:
    course = descent(dynamics, lr, every)
    recorded = metrics, keep, progress, moments, every, limit, origin
    return record(course, window, *recorded)


def integrate(
    flow: Flow,
    start: PyTree | Window | Reached,
    steps: int,
    *,
    lr: PyTree = None,
    solver: diffrax.AbstractSolver | None = None,
    substeps: float | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    keep: Callable[[PyTree], PyTree] = everything,
    key: Array | None = None,
    progress: Progress | None = None,
    limit: float = LIMIT,
    origin: PyTree = None,
) -> Trajectory:
    """Solve a flow with diffrax, saving at whole optimizer steps.

    It compiles once for a flow and shapes, a flow that is built again from the same
    parts included; `lr` is data, so a grid of learning rates goes through one
    compilation, in a loop or under `jax.vmap`.

    **Arguments**

    - `flow`: from `rodjax.flows`.
    - `start`: parameters, for a flow from scratch: the optimizer's state is then a new
      one, its schedules at their beginning. Or a `Window` of a run to go on from, as
      for `descend`, or the `final` of this flow's own trajectory.
    - `steps`, `every`, `metrics`, `keep`, `progress`, `limit`, `origin`: as for
      `descend`.
    - `lr`: the learning rate if the flow's dynamics take one.
    - `solver`: any diffrax solver of ODEs, explicit or implicit. By default, and with
      constant steps, Euler's method for a flow that has an `euler_field`, as
      `modulated` does, and Heun's for others. For long steps of an optimizer without
      momentum, `rodjax.RKC`.
    - `substeps`: solver steps to an optimizer step; by default 2 of a flow's own Euler
      steps, else 4, which is safe with Heun. Below 1, with a solver that is stable
      there, steps of several optimizer steps.
    - `stepsize_controller`: of diffrax; constant steps by default. An adaptive one
      weighs errors by the flow's `error_norm`, unless it has a norm of its own.
      Adaptive steps, and constant ones longer than `every`, pass over saved moments,
      which are interpolated; the solver starts afresh after about 64 optimizer steps,
      whose saved states are in memory together.
    - `adjoint`: how the solution is differentiated, in `lr` and in `start`:
      `diffrax.RecursiveCheckpointAdjoint()` by default, in reverse (`jax.grad`);
      `diffrax.ForwardMode()` for `jax.jvp` and `jax.jacfwd`.
    - `key`: of what the flow draws at random; `jax.random.key(0)` if `None`.

    **Returns** a `Trajectory`. A lane whose state stops being finite (or outgrows the
    square root of the largest float, or whose controller gives up) is frozen and says
    so in `diverged_at`; others go on.

    **Memory**, beyond the gradient's own and whatever `steps` is: with Heun three
    copies of the flow's state and what its vector field takes, as each flow says;
    another for every stage of a solver with a tableau.

    **Raises** `ValueError` on `substeps` that are not positive, or not above 1 with
    Euler's own field, on a `steps` that is not a positive
    multiple of `every`, on metrics that record the same name, on a solver or adjoint
    that cannot serve, on the `final` of another flow, and what the flow and its
    dynamics say of their arguments. `TypeError` in forward mode without its adjoint.

    **Derivatives** are those of the numerical solution, and NaN where the optimizer has
    none: that of the root of a second moment does not exist at zero, where Adam keeps a
    coordinate whose gradient is exactly zero (a dead unit, a constant input). Give it
    an epsilon under the root, `optax.adam(lr, eps_root=1e-16)`. `principal` has none,
    JAX knowing no derivative of non-symmetric eigenvectors, unless it is cut to a few
    directions.

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> flow = rj.flows.stable(sgd)
    >>> solve = lambda lr: rj.integrate(flow, jnp.ones(2), steps=5, lr=lr)
    >>> paths = jax.vmap(solve)(jnp.array([0.1, 0.2, 0.3]))
    >>> paths.metrics["loss"].shape
    (3, 6)
    >>> slope = jax.grad(lambda lr: solve(lr).metrics["loss"][-1])(0.1)
    >>> bool(slope < 0)  # larger steps come further down
    True

    ```
    """
    moments = saved_moments(steps, every)
    method = solving(solver, substeps, stepsize_controller, adjoint)
    key = jax.random.key(0) if key is None else key
    every_metric = (losses(flow.dynamics.loss), *metrics)
    origin = jax.tree.map(jnp.asarray, origin)
    try:
        if isinstance(start, Reached):
            lr = _check_own(flow, start, lr, key)
        else:
            params = start.at(0).params if isinstance(start, Window) else start
            lr = flow.dynamics.cast(params, lr=lr)
            start = _begun(flow, jax.tree.map(jnp.asarray, start), lr, key)
        recorded = every_metric, keep, progress, moments, every, limit, origin
        return _integrate(flow, start, lr, method, *recorded)
    except (TypeError, ValueError) as error:
        if not any(words in str(error) for words in UNDIFFERENTIABLE):
            raise
        # JAX says the same of the solver's loop, differentiated from outside, and of a
        # loss, differentiated within.
        given = jax.tree.leaves((start, lr))
        outside = any(isinstance(x, Tracer) for x in given)
        raise TypeError(FORWARD if outside else SECOND) from error


# By itself, so that a flow goes the same way, to the last bit, however it was begun.
_begun = compiled(begun)


@compiled
def _integrate(
    flow: Flow,
    start: Reached,
    lr: PyTree,
    method: Method,
    metrics: tuple[Metric, ...],
    keep: Callable[[PyTree], PyTree],
    progress: Progress | None,
    moments: int,
    every: int,
    limit: float,
    origin: PyTree,
) -> Trajectory:
    together = method.of(flow).together(every, moments)
    course = solution(flow, lr, every, method, together)
    recorded = metrics, keep, progress, moments, every, limit, origin
    return record(course, start, *recorded)


def saved_moments(steps: int, every: int) -> int:
    """The moments saved after the first. Raises `ValueError` if they do not fit."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if steps < 1 or steps % every:
        raise ValueError(
            f"steps must be a positive multiple of every={every}, got {steps}"
        )
    return steps // every


def opened(
    dynamics: Dynamics, start: PyTree | Window, lr: PyTree
) -> tuple[Window, PyTree]:
    """The window that a run goes on from, and `lr` as arrays."""
    if isinstance(start, Reached):
        raise TypeError(
            "start is the final of a flow, which an optimizer cannot go on from: give "
            "parameters, or a Window (of warm_up, or the final of a run)"
        )
    window = start if isinstance(start, Window) else warm_up(dynamics, start, lr=lr)
    return window, dynamics.cast(window.at(0).params, lr=lr)


def _check_own(flow: Flow, start: Reached, lr: PyTree, key: Array) -> PyTree:
    """`lr` as arrays; raises `ValueError` unless the state is one of this flow's."""
    kind = lambda tree: (
        jax.tree.structure(tree),
        [(x.shape, x.dtype) for x in jax.tree.leaves(tree)],
    )
    try:
        params = flow.centre(start.state).params
    except AttributeError:
        same = False
    else:
        lr = flow.dynamics.cast(params, lr=lr)
        own = jax.eval_shape(partial(flow.init, lr=lr, key=key), params)
        same = kind(own) == kind(start.state)
    if not same:
        raise ValueError(
            "start is the final of another flow: go on with the flow and options that "
            "it is of, or start from a Window"
        )
    return lr
