"""What flows predict from a checkpoint on, over a grid of learning rates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from rodjax.flows import REGISTRY, Flow
from rodjax.optimizer import Dynamics, Window, compiled
from rodjax.solve import (
    LIMIT,
    RUN,
    Method,
    Metric,
    Trajectory,
    check_flows,
    descend,
    edge_of_stability,
    integrate,
    saved_moments,
    solving,
)
from rodjax.training._forecast_table import labelled
from rodjax.training._full_batch import check_full_batch

if TYPE_CHECKING:
    import xarray

#: Saved moments, at least, where nothing else is asked for.
MOMENTS = 20


class Forecast(NamedTuple):
    """What is computed; static, so equal ones share a compilation."""

    dynamics: Dynamics
    flows: tuple[tuple[str, Flow], ...]
    runs: bool
    steps: int
    every: int
    metrics: tuple[Metric, ...]
    method: Method
    limit: float


class Found(NamedTuple):
    """What a model comes to: [lanes, ...]."""

    steps: Float[Array, "..."]
    metrics: dict[str, Array]
    evaluations: Float[Array, "..."]
    diverged_at: Float[Array, "..."]


def forecast(
    dynamics: Dynamics,
    start: PyTree | Window,
    steps: int,
    *,
    lrs: ArrayLike,
    flows: Sequence[str] | Mapping[str, Flow] = ("stable", "modulated"),
    runs: bool = False,
    every: int | None = None,
    metrics: Sequence[Metric] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    substeps: float | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    lane_chunk: int | None = None,
    limit: float = LIMIT,
) -> "xarray.Dataset":
    """What flows predict for the next steps of a run, for several learning rates.

    All learning rates and flows go through one program, compiled once: another start
    and other learning rates, as many, cost no compilation.

    The optimizer keeps its moments and its step count, and so its place in a schedule.
    The states of the window were made at the old learning rate, and the new one holds
    from there on: for a flow from the window's middle, where it starts, for a run from
    the window's last state, three steps later. That is a fair start, as of a run whose
    learning rate is changed: what it carries is of the old one.

    A flow that goes on is no promise: on digits (`benchmarks/forecast.py`) the
    modulated flow called 6 of 12 learning rates at which the run diverged, and none at
    which it did not; the stable flow knows of no edge and called none.

    Flows model full-batch training, and so does a forecast, whatever the run before it
    was. Started from a checkpoint of a run of mini-batches, a flow predicted its next
    200 steps no better than the stable flow: 1.31 against 1.32 off, of a distance
    travelled of 5.25.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`, of a function of the learning rate, such as
      `optax.adam`, or `lambda lr: optax.adam(optax.cosine_decay_schedule(lr, 1000))`
      for the peak of a schedule. One that keeps its learning rate in its state is given
      as a function too, `lambda lr: optax.inject_hyperparams(optax.adam)(lr)`: what
      of the state depends on it is then set to that of each lane.
    - `start`: a `Window` of the run, from `rodjax.training.window`; or parameters, for
      runs from scratch.
    - `steps`: optimizer steps ahead, a multiple of `every`.
    - `lrs`: [n], positive.
    - `flows`: names in `rodjax.flows.REGISTRY`, built with their defaults; or name ->
      flow, of the same `dynamics`.
    - `runs`: whether to run the optimizer itself as well, to check the forecast by.
    - `every`: save every so many steps; by default as rarely as leaves 20 moments.
    - `metrics`: beside the losses; by default `edge_of_stability(dynamics)`.
    - `solver`, `substeps`, `stepsize_controller`: as for `integrate`.
    - `lane_chunk`: learning rates in memory at a time; all by default.
    - `limit`: of divergence, relative to the start; see `descend`. An optimizer whose
      steps are bounded, such as Adam, seldom gets that far: look at the loss as well.

    **Returns** an `xarray.Dataset` like that of `rodjax.sweep`, with the dimensions
    `flow` ("run" first, if `runs`), `lr` in ascending order, and `step` (optimizer
    steps). Its variables: every metric (`loss` at the centre, `mean_loss` over the
    oscillation, which is what a log of the loss shows on average, `amplitude`,
    `sharpness_ratio`), NaN from where a model diverged; `diverged_at` and
    `evaluations` (of the update map); `end_loss`, the last `mean_loss`; and for each
    flow `largest_lr`, below which (itself included) none of the `lrs` diverges. See
    `rodjax.training.table` and `rodjax.plot_forecast`.

    **Raises** `ValueError` on `lrs` that are not positive numbers in one dimension, on
    an unknown flow or none, one called "run" or of other dynamics, on `steps` that are
    not a multiple of `every`, on a loss that is not the same when asked twice, on
    `dynamics` that take no learning rate, and what `integrate` says of its arguments;
    `ImportError` without xarray (`rodjax[sweep]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: jnp.log(jnp.cosh(w)))
    >>> params, opt_state = jnp.array(1.0), optax.sgd(1.0).init(jnp.array(1.0))
    >>> start = rj.training.window(sgd, params, opt_state, step=100, lr=1.0)
    >>> data = rj.training.forecast(sgd, start, 40, lrs=[1.0, 1.5], metrics=())
    >>> dict(data.mean_loss.sizes), data.step.values[[0, -1]].tolist()
    ({'flow': 2, 'lr': 2, 'step': 21}, [103.0, 143.0])
    >>> data.largest_lr.sel(flow="modulated").item()
    1.5

    ```
    """
    try:
        import xarray  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "forecast needs xarray: pip install 'rodjax[sweep]'"
        ) from error
    rates = np.sort(_rates(lrs))
    every = _sparse(steps) if every is None else every
    saved_moments(steps, every)
    if lane_chunk is not None and lane_chunk < 1:
        raise ValueError(f"lane_chunk must be at least 1, got {lane_chunk}")
    named = _flows(dynamics, flows)
    if not named and not runs:
        raise ValueError("flows is empty, without runs: there is nothing to forecast")
    if metrics is None:
        metrics = (edge_of_stability(dynamics),)
    window = isinstance(start, Window)
    params = start.at(0).params if window else jax.tree.map(jnp.asarray, start)
    check_full_batch(dynamics.loss, params)
    start = start if window else params
    method = solving(solver, substeps, stepsize_controller)
    what = Forecast(dynamics, named, runs, steps, every, tuple(metrics), method, limit)
    lanes = dynamics.cast(params, lr=jnp.asarray(rates))
    models = [RUN] * runs + [name for name, _ in named]
    computed = _forecast(what, start, lanes, lane_chunk)
    found = dict(zip(models, computed, strict=True))
    long_names = {}
    for _, flow in named:
        long_names |= flow.reports
    for metric in metrics:
        long_names |= metric.long_names
    settings = {
        "steps": steps,
        "every": every,
        "limit": limit,
        **method.settings(),
    }
    return labelled(found, rates, long_names, settings)


@compiled
def _forecast(
    what: Forecast, start: PyTree | Window, lrs: Array, lane_chunk: int | None
) -> list[Found]:
    """Every model at every learning rate, as one program."""

    def lane(lr: Array) -> list[Found]:
        own = start
        if isinstance(start, Window):
            own = _at_rate(what.dynamics, start, lr)
        shared: Any = {
            "lr": lr,
            "every": what.every,
            "metrics": what.metrics,
            "keep": lambda params: None,
            "limit": what.limit,
        }
        found = []
        if what.runs:
            found.append(_found(descend(what.dynamics, own, what.steps, **shared)))
        solved = what.method._asdict()
        for _, flow in what.flows:
            path = integrate(flow, own, what.steps, **solved, **shared)
            found.append(_found(path))
        return found

    if lane_chunk is None:
        return jax.vmap(lane)(lrs)
    return jax.lax.map(lane, lrs, batch_size=lane_chunk)


def _found(path: Trajectory) -> Found:
    return Found(path.steps, path.metrics, path.evaluations, path.diverged_at)


def _at_rate(dynamics: Dynamics, window: Window, lr: Array) -> Window:
    """The window with what the state holds of the learning rate set to `lr`."""
    params = window.at(0).params
    ours, other = (dynamics.init(params, lr=x).rest for x in (lr, 2 * lr))

    def chosen(kept: Array, new: Array, else_: Array) -> Array:
        if not jnp.issubdtype(kept.dtype, jnp.floating):
            return kept
        return jnp.where(new == else_, kept, jnp.astype(new, kept.dtype))

    rest = jax.tree.map(chosen, window.states.rest, ours, other)
    return window._replace(states=window.states._replace(rest=rest))


def _rates(lrs: ArrayLike) -> np.ndarray:
    rates = np.asarray(lrs, np.float64)
    if rates.ndim != 1 or not rates.size or not np.all(np.isfinite(rates)):
        raise ValueError(
            f"lrs must be finite numbers in one dimension, one at least; got {lrs}"
        )
    if np.any(rates <= 0):
        raise ValueError(f"lrs must be positive, got {rates[rates <= 0][0]:g}")
    return rates


def _sparse(steps: int) -> int:
    """The most that divides `steps` and leaves enough moments."""
    most = max(1, steps // MOMENTS)
    return next(every for every in range(most, 0, -1) if steps % every == 0)


def _flows(
    dynamics: Dynamics, flows: Sequence[str] | Mapping[str, Flow]
) -> tuple[tuple[str, Flow], ...]:
    if not isinstance(flows, Mapping):
        for name in flows:
            if name not in REGISTRY:
                known = ", ".join(REGISTRY)
                raise ValueError(f"flows: there is no {name!r}, only {known}")
        return tuple((name, REGISTRY[name].build(dynamics)) for name in flows)
    check_flows(dynamics, flows)
    return tuple(flows.items())
