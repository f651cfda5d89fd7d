"""A sweep's program on its devices: compiled once, sharded, no larger than memory."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rodjax.optimizer import Same
from rodjax.sweeps._digest import Digests, digests, text_of
from rodjax.sweeps._lanes import Places, Rows, Spec, follow, set_out
from rodjax.sweeps._memory import available

#: The part of a device's memory that a chunk may take.
SHARE = 0.8
AXIS = "lanes"

#: Of jax.Device, which is a variable to type checkers.
Devices = tuple[Any, ...]


class Frozen(NamedTuple):
    """The structure, shapes and dtypes of a tree; hashable."""

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Frozen":
        """Those of a tree of arrays."""
        leaves, structure = jax.tree.flatten(jax.tree.map(_shape, tree))
        return cls(structure, tuple(leaves))

    def stacked(self, lanes: int) -> "Frozen":
        """Those of so many trees, stacked on a leading axis."""
        leaves = [jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype) for x in self.leaves]
        return Frozen(self.structure, tuple(leaves))

    def on(self, sharding: NamedSharding) -> PyTree:
        """The tree of shapes, to be laid out so."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.tree.unflatten(self.structure, self.leaves),
        )


class Program(NamedTuple):
    """A compiled chunk of `lanes` lanes and up to `length` moments after the first.

    - `lanes`: of all devices together; `bytes`: memory that it takes on each device.
    - `seconds`: that it took to build, in this call or an earlier one.
    - `run(params, points, places, fresh, count) -> (places, rows)`, see `follow`: as
      `jax.jit(...).lower(...).compile()` returns it.
    - `places`: what is carried between calls, as shapes; `rows`: what comes out.
    - `digests`: of what the compiler was given, to tell others from it.
    """

    lanes: int
    length: int
    bytes: int
    seconds: float
    run: jax.stages.Compiled
    places: Places
    rows: Rows
    digests: Digests


# Few, for each holds what its functions close over, which may be a whole data set.
@functools.lru_cache(maxsize=2)
def build(
    same: Same,
    devices: Devices,
    lanes: int,
    length: int,
    params: Frozen,
    point: Frozen,
) -> Program:
    """Compile for `lanes` lanes, a multiple of the `devices`, sharded over them.

    `same` is the flattened `Spec`, so that equal ones share a compilation.
    `params` are the shapes of the parameters and `point` those of one lane's point.
    """
    began = time.perf_counter()
    leaves, structure = same.thing
    spec: Spec = jax.tree.unflatten(structure, leaves)
    program, given = chunk_of(spec, mesh_of(devices), lanes, length, params, point)
    traced = program.trace(*given)
    lowered = traced.lower()
    text = text_of(lowered)
    check_threads(devices, text)
    compiled = lowered.compile()
    return Program(
        lanes,
        length,
        _bytes(compiled),
        time.perf_counter() - began,
        compiled,
        given[2],
        lowered.out_info[1],
        digests(traced, text),
    )


def chunk_of(
    spec: Spec,
    mesh: Mesh | AbstractMesh,
    lanes: int,
    length: int,
    params: Frozen,
    point: Frozen,
) -> tuple[Any, tuple[Any, ...]]:
    """The function `run` of a `Program`, jitted, and its arguments as shapes."""
    across, alike = shardings(mesh)

    def chunk(params, points, places, fresh, count):
        follow_all = jax.vmap if lanes > mesh.size else alone
        lane = functools.partial(follow, spec, length, params)
        one = lambda point, place: lane(point, place, fresh, count)
        return follow_all(one)(points, places)

    # Each device follows its own lanes: none waits for another's inner loops.
    program = jax.jit(
        jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(alike.spec, across.spec, across.spec, alike.spec, alike.spec),
            out_specs=across.spec,
            check_vma=False,
        ),
        donate_argnums=2,
    )
    batch = point.stacked(lanes).on(across)
    first = jax.vmap(functools.partial(set_out, spec), in_axes=(None, 0))
    try:
        places = Frozen.of(jax.eval_shape(first, params.on(alike), batch)).on(across)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"grid: one of {', '.join(batch)} is used for a decision in Python, so it "
            "cannot differ from lane to lane: run one sweep for each of its values"
        ) from error
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=alike)
    fresh, count = scalar(jnp.bool), scalar(jnp.int32)
    return program, (params.on(alike), batch, places, fresh, count)


def alone(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`jax.vmap` over an axis of one: a smaller program, whose branches stay so."""
    return lambda *trees: jax.tree.map(
        lambda x: x[None], function(*jax.tree.map(lambda x: x[0], trees))
    )


def fit(
    spec: Spec,
    devices: Devices,
    params: Frozen,
    point: Frozen,
    total: int,
    lanes: int | None,
    length: int,
    fixed: bool,
) -> Program:
    """The program for a chunk of `lanes`, or if `None` of as many as memory holds.

    At most `total` are needed. Its `length` is shortened too where even one lane on
    each device is too large for memory, unless it is `fixed`.
    """
    # Flat, for solvers and controllers are equal by their parts.
    same = Same(jax.tree.flatten(spec))
    count, room = len(devices), SHARE * memory(devices)
    chosen = _evenly(total, total, count) if lanes is None else lanes
    while True:
        program = build(same, devices, chosen, length, params, point)
        excess = program.bytes / room
        if excess <= 1.0:
            return program
        if lanes is None and chosen > count:
            chosen = _evenly(total, min(int(chosen / excess), chosen - 1), count)
        elif not fixed and length > 1:
            length = max(1, min(int(length / excess), length - 1))
        else:
            return program


def cores() -> int:
    """The CPU cores that a container or a batch system leaves this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def check_threads(devices: Devices, text: str) -> None:
    """Raise `ValueError` where the program would wait for itself for ever.

    LAPACK's batched functions hold a thread of XLA's pool for each CPU device while
    they wait for others of the same pool.
    """
    mine = [d for d in devices if d.process_index == jax.process_index()]
    threads = int(os.environ.get("NPROC", cores()))
    short = mine[1:] and mine[0].platform == "cpu" and len(mine) >= threads
    if short and "lapack" in text:
        raise ValueError(
            f"{len(mine)} CPU devices and {threads} threads of XLA would wait for each "
            "other for ever: set the environment variable NPROC to twice the devices "
            "before JAX starts, or give fewer devices"
        )


def memory(devices: Devices) -> float:
    """Bytes that every device can give; of a CPU half of those there are."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    least = min(map(_memory, mine or jax.local_devices()))
    if jax.process_count() > 1:
        # All processes must come to the same program.
        least = float(np.min(multihost_utils.process_allgather(np.float32(least))))
    return least


def _memory(device: Any) -> float:
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return 0.5 * available() / jax.local_device_count()


def mesh_of(devices: Devices) -> Mesh:
    """The devices in a row, for lanes to be spread over."""
    return Mesh(np.array(devices), (AXIS,))


def shardings(mesh: Mesh | AbstractMesh) -> tuple[NamedSharding, NamedSharding]:
    """Of what differs by lane, and of what all lanes share."""
    return (
        NamedSharding(mesh, PartitionSpec(AXIS)),
        NamedSharding(mesh, PartitionSpec()),
    )


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Host arrays, the same in every process, as arrays on all devices."""

    def one(x):
        host = np.asarray(x, _shape(x).dtype)
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    return jax.tree.map(one, tree)


def get(tree: PyTree) -> PyTree:
    """The whole of arrays on all devices, as host arrays in every process."""
    return jax.tree.map(
        lambda x: (
            np.asarray(x)
            if x.is_fully_addressable
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )


def _evenly(total: int, most: int, devices: int) -> int:
    """Lanes of a chunk, so that chunks of at most so many differ least in size."""
    most = max(most // devices * devices, devices) if most < total else most
    chunks = -(-total // most)
    return -(-total // (chunks * devices)) * devices


def _bytes(compiled: jax.stages.Compiled) -> int:
    needs = compiled.memory_analysis()
    parts = ("temp", "argument", "output")
    sizes = [getattr(needs, f"{part}_size_in_bytes", 0) for part in parts]
    return sum(sizes) - getattr(needs, "alias_size_in_bytes", 0)


def _shape(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype))
