"""A grid of runs and flows as one compiled program, chunk by chunk."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from rodjax.flows import Flow
from rodjax.optimizer import Dynamics
from rodjax.solve import (
    LIMIT,
    NUDGED,
    Metric,
    check_flows,
    saved_moments,
    solving,
)
from rodjax.sweeps import _table as table
from rodjax.sweeps._blocks import Blocks, Status
from rodjax.sweeps._grid import SEED, Axes, Grid, make_grid
from rodjax.sweeps._lanes import Spec, models
from rodjax.sweeps._program import Frozen, fit
from rodjax.sweeps._store import Store, check_same, settings_in

if TYPE_CHECKING:
    import xarray

FILE = "result.nc"
#: Chunks of time, if nothing else is asked for.
CHUNKS = 20
#: Settings that are only known when the program is built.
LATE = ("lane_chunk", "time_chunk", "program", "data")


def sweep(
    dynamics: Dynamics,
    params: PyTree,
    steps: int,
    *,
    grid: Axes,
    draw: Callable[[Array], PyTree] | None = None,
    flows: Mapping[str, Flow] | None = None,
    warmup: int = 0,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    keep: Callable[[PyTree], PyTree] = lambda params: None,
    solver: diffrax.AbstractSolver | None = None,
    substeps: float | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    lane_chunk: int | None = None,
    time_chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Status], None] | None = None,
    limit: float = LIMIT,
    predictability: bool = False,
) -> "xarray.Dataset":
    """Run an optimizer and its flows on every point of a named grid.

    All lanes go through one compiled program, vmapped within a device and sharded over
    devices, those of other processes of `jax.distributed` too. Lane by lane it computes
    what `warm_up`, `descend`, `integrate` and `compare` do.

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`, of a function of the learning rate; if the
      grid has other names than `lr` and `seed`, of a function of the dict of all names
      but `seed`, such as `lambda h: optax.sgd(h["lr"], momentum=h["momentum"])`. What
      such a function reads is data; it must not branch on it.
    - `params`: initial parameters, the same of every lane; `None` if they are drawn.
    - `steps`: optimizer steps compared, a multiple of `every`.
    - `grid`: name -> numbers. Names are crossed, unless zipped along one dimension as
      `{("lr", "momentum"): ([0.1, 0.2], [0.9, 0.8])}`; a single number is the same for
      all lanes.
    - `draw`: from a key to initial parameters: a lane's from `jax.random.key(seed)`, in
      a grid that has `seed`.
    - `flows`: name -> flow, from `rodjax.flows`, of the same `dynamics`. Their `floor`
      may be a function of the dict of names, too.
    - `warmup`: optimizer steps before the window from which the flows start.
    - `every`, `metrics`, `solver`, `substeps`, `stepsize_controller`: as for
      `integrate`, the first two for the run as well.
    - `keep`: what to keep of the parameters at every saved moment; nothing by default.
    - `lane_chunk`: lanes in memory at a time, rounded up to a multiple of the devices;
      by default as many as fit.
    - `time_chunk`: optimizer steps computed at a time, a multiple of `every`; by
      default a twentieth of them. It bounds what is recorded on the devices, and what a
      killed sweep loses.
    - `devices`: all of every process by default.
    - `out`: a directory, for checkpoints (orbax) after every chunk and for the result,
      `result.nc`. The same call again goes on after the last complete chunk, to the
      same bits. Processes of one sweep must share it.
    - `settings`: attributes of the result, numbers or strings.
    - `progress`: called with a `rodjax.sweeps.Status` after every chunk.
    - `limit`: of divergence, as for `descend`, relative to the initial parameters.
    - `predictability`: whether to find every lane's predictability limit too, the
      `distance` of the entry "limit" beside the flows', as `rj.predictability` does:
      four more runs of the optimizer.

    **Returns** an `xarray.Dataset` with the dimensions `flow` ("run", the optimizer
    itself, and the flows' names), those of the grid, and `step` (optimizer steps). Its
    variables: every metric, NaN where a model lacks it or has diverged; `distance`, as
    `compare`'s; and without `step`, `diverged_at` (see `Trajectory`; NaN if it did
    not), `evaluations` (of the update map), and the entries of
    `Comparison.summary`. Parameters kept are called `params.` and their path. With
    `out` the data set is read from the file as needed.

    **Raises** before anything is run: `ValueError` on a malformed grid, on `steps` or
    chunks that do not fit, on metrics that record the same name or more than numbers,
    on an `out` that holds a sweep with other settings, naming what differs; what
    dynamics and flows say of their arguments; `ImportError` without xarray or orbax
    (`rodjax[sweep]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> flows = {"modulated": rj.flows.modulated(sgd)}
    >>> grid = {"lr": [0.5, 1.0, 5.0], "seed": [0, 1]}
    >>> draw = lambda key: jax.random.normal(key, (2,))
    >>> data = rj.sweep(sgd, None, 800, draw=draw, grid=grid, flows=flows, every=100)
    >>> dict(data.distance.sizes)
    {'flow': 2, 'lr': 3, 'seed': 2, 'step': 9}
    >>> data.diverged_at.sel(flow="run").notnull().any("seed").values.tolist()
    [False, False, True]

    ```
    """
    points, flows = make_grid(grid), dict(flows or {})
    _check(dynamics, draw, points, flows, warmup, lane_chunk, dict(settings or {}))
    if predictability and NUDGED in flows:
        raise ValueError(
            f"flows: {NUDGED!r} is the name of the predictability limit: give another"
        )
    moments = saved_moments(steps, every)
    length = _length(moments, every, time_chunk)
    method = solving(solver, substeps, stepsize_controller)
    if (params is None) == (draw is None):
        raise ValueError(
            "params, the same of every lane, or draw, a function from a key to them: "
            "give one of the two (and params=None with draw)"
        )
    params = () if params is None else jax.tree.map(jnp.asarray, params)
    spec = Spec(
        dynamics,
        draw,
        tuple(flows.items()),
        warmup,
        every,
        tuple(metrics),
        keep,
        method,
        limit,
        predictability,
    )
    point = jax.tree.map(lambda x: x[0], points.points(0, 1))
    described = {
        "steps": steps,
        "warmup": warmup,
        "every": every,
        "limit": limit,
        **method.settings(),
    }
    chosen = tuple(jax.devices() if devices is None else devices)
    directory = None if out is None else Path(out)
    named = described | {
        "jax": jax.__version__,
        "devices": f"{len(chosen)} x {chosen[0].device_kind}",
        "stepsize_controller": type(method.stepsize_controller).__name__,
        "flows": models(spec)[1:],
        "zipped": [list(names) for names in points.dims],
        "params": _digest(params),
        **{f"grid {name}": value.tolist() for name, value in points.values.items()},
    }
    settings = dict(settings or {})
    if taken := settings.keys() & {*named, *LATE}:
        raise ValueError(
            f"settings: the sweep itself says {', '.join(sorted(taken))}: give it "
            "another name"
        )
    named = settings | named
    at = warmup + every * np.arange(moments + 1)
    empty = table.header(points, models(spec), at, settings | described)
    lanes = None if lane_chunk is None else -(-lane_chunk // len(chosen)) * len(chosen)
    fixed = time_chunk is not None
    if directory is not None and (stored := settings_in(directory)) is not None:
        asked = named | ({} if lanes is None else {"lane_chunk": lanes})
        asked |= {"time_chunk": length * every} if fixed else {}
        late = {name: stored[name] for name in LATE if name in stored}
        check_same(directory, stored, late | asked)
        lanes, length = stored["lane_chunk"], stored["time_chunk"] // every
        fixed = True
    shapes = Frozen.of(params), Frozen.of(point)
    program = fit(spec, chosen, *shapes, points.lanes, lanes, length, fixed)

    store = None
    if directory is not None:
        named |= {
            "lane_chunk": program.lanes,
            "time_chunk": program.length * every,
            **program.digests._asdict(),
        }
        if (stored := settings_in(directory)) is not None:
            check_same(directory, stored, named)
        store = Store(directory, named)
    named_long = table.long_names(spec)
    blocks = Blocks(spec, program, points, moments, chosen, store)
    blocks.run(params, progress)
    if directory is None:
        return table.in_memory(blocks, points, empty, named_long)
    if jax.process_index() == 0:
        table.on_disk(blocks, points, empty, named_long, directory / FILE)
    blocks.close()
    return table.read(directory / FILE)


def _check(
    dynamics: Dynamics,
    draw: Callable[[Array], PyTree] | None,
    grid: Grid,
    flows: Mapping[str, Flow],
    warmup: int,
    lane_chunk: int | None,
    settings: Mapping[str, Any],
) -> None:
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if lane_chunk is not None and lane_chunk < 1:
        raise ValueError(f"lane_chunk must be at least 1, got {lane_chunk}")
    for name, value in settings.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(
                f"settings: {name} must be a number or a string, as attributes of "
                f"netCDF are, not {value!r}"
            )
    if SEED in grid.values and draw is None:
        raise ValueError(
            "grid has a seed, which draws initial parameters: give draw, a function of "
            "a key, such as lambda key: jax.random.normal(key, (3,)), and params=None"
        )
    check_flows(dynamics, flows)


def _length(moments: int, every: int, time_chunk: int | None) -> int:
    """Saved moments in a chunk of time."""
    if time_chunk is None:
        return -(-moments // CHUNKS)
    if time_chunk < 1 or time_chunk % every:
        raise ValueError(
            f"time_chunk must be a positive multiple of every={every}, got {time_chunk}"
        )
    return min(time_chunk // every, moments)


def _digest(params: PyTree) -> str:
    """Of the initial parameters, to tell others from them."""
    digest = hashlib.sha256(str(jax.tree.structure(params)).encode())
    for leaf in jax.tree.leaves(params):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
