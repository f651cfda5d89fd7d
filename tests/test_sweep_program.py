"""A sweep's program: its memory, what tells it from another, and what it holds."""

import gc
import os
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.sweeps._digest import digests, text_of
from rodjax.sweeps._memory import available
from rodjax.sweeps._program import memory

MACHINE = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
#: What version 1 of cgroups writes where there is no limit.
NO_LIMIT = "9223372036854771712\n"
SMALL, LARGE = "1048576\n", "2097152\n"
V1, V2 = "memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {f"a/b/{V2}": LARGE}, 2**21),
        ("0::/a/b\n", {f"a/b/{V2}": "max\n", f"a/{V2}": SMALL}, 2**20),
        ("0::/a/b\n", {f"a/b/{V2}": SMALL, f"a/{V2}": LARGE}, 2**20),
        # In a namespace of its own the container's group is the root.
        ("0::/\n", {V2: SMALL}, 2**20),
        ("0::/../b\n", {V2: SMALL, f"../b/{V2}": "1\n"}, 2**20),
        ("4:cpu,memory:/a\n0::/c\n", {f"memory/a/{V1}": SMALL}, 2**20),
        ("4:memory:/a\n", {f"memory/a/{V1}": NO_LIMIT, f"memory/{V1}": LARGE}, 2**21),
        # The path is the host's, of which a container sees nothing.
        ("4:memory:/docker/1\n", {f"memory/{V1}": SMALL}, 2**20),
        ("3:cpu:/a\n", {f"memory/a/{V1}": SMALL}, MACHINE),
        ("4:memory:/a\n", {f"memory/a/{V1}": NO_LIMIT}, MACHINE),
        ("0::/a\n", {f"a/{V2}": "max\n"}, MACHINE),
        (None, {V2: SMALL}, MACHINE),
    ],
)
def test_the_least_limit_of_memory_counts(tmp_path, groups, files, expected):
    group, root = tmp_path / "cgroup", tmp_path / "sys" / "fs"
    if groups is not None:
        group.write_text(groups)
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert available(group, root) == expected


def test_a_sweep_may_take_half_of_it():
    assert memory(tuple(jax.devices())) == 0.5 * available() / jax.local_device_count()


def traced(data):
    """A function that closes over data, within a branch of a loop too."""
    loss = lambda w: jnp.sum(data * w**2)

    def body(_, w):
        step = lambda w: w - 1e-3 * jax.grad(loss)(w)
        return jax.lax.cond(loss(w) > 1.0, step, lambda w: 0.5 * w, w)

    return jax.jit(lambda w: jax.lax.fori_loop(0, 3, body, w)).trace(1.0)


def of(data):
    found = traced(data)
    return digests(found, text_of(found.lower()))


def test_program_and_data_are_told_apart():
    data = np.linspace(1.0, 2.0, 20)
    found = of(data)
    assert of(data.copy()) == found
    other = of(np.nextafter(data, data + (np.arange(20) == 19)))
    assert other.program == found.program and other.data != found.data
    longer = of(np.linspace(1.0, 2.0, 21))
    assert longer.program != found.program and longer.data != found.data


@pytest.mark.parametrize("shape", [(), (20,)])
def test_keys_are_data(shape):
    def of(seed):
        key = jax.random.split(jax.random.key(seed), shape)
        found = jax.jit(lambda x: x + jnp.sum(jax.random.key_data(key))).trace(1)
        return digests(found, text_of(found.lower()))

    assert of(0) == of(0) and of(0).data != of(1).data


CONSTANTS = "jax_use_simplified_jaxpr_constants"


@pytest.fixture
def moved(request):
    """Constants where JAX will once keep them: by each operation that uses them."""
    if not hasattr(jax.config, CONSTANTS):
        pytest.skip("this JAX has one place for constants")
    before = getattr(jax.config, CONSTANTS)
    jax.config.update(CONSTANTS, not before)
    yield
    jax.config.update(CONSTANTS, before)


def check_not_written_out():
    data = np.arange(4e6)
    found = traced(data)
    lowered = found.lower()
    tracemalloc.start()
    text = text_of(lowered)
    seen = digests(found, text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) < 1e5 and peak < 1e6 < data.nbytes
    data[-1] += 1
    assert digests(traced(data), text).data != seen.data


def test_data_is_not_written_out():
    """Neither as text nor as a copy."""
    check_not_written_out()


@pytest.mark.usefixtures("moved")
def test_data_elsewhere_is_not_written_out():
    check_not_written_out()


def swept(data):
    """A sweep whose loss holds the data."""
    sgd = rj.dynamics(optax.sgd, lambda w: jnp.sum((w * data) ** 2))
    seen = []
    rj.sweep(sgd, jnp.ones(2), 2, grid={"lr": 0.1}, progress=seen.append)
    return seen[0].program


def test_only_the_last_two_programs_are_held():
    """With them goes what their functions close over."""
    held, programs = [], []
    for size in (1.0, 2.0, 3.0):
        data = jnp.full(2, size)
        held.append(weakref.ref(data))
        programs.append(swept(data))
        del data
    gc.collect()
    assert [data() is None for data in held] == [True, False, False]
    # The second is still there, and is not built again.
    last = held[1]()
    assert swept(last).run is programs[1].run


def measured(flows, **options):
    """A sweep of gradient descent, and how often its metric was traced."""
    sgd = rj.dynamics(optax.sgd, lambda w: jnp.sum(w**2) / 2 + w[0] ** 4)
    edge, calls = rj.edge_of_stability(sgd), []

    def update(snapshot, vector, *, lr):
        calls.append(snapshot)
        return edge.update(snapshot, vector, lr=lr)

    flows = {name: getattr(rj.flows, name)(sgd) for name in flows}
    metrics = [rj.Metric(edge.init, update)]
    start = jnp.array([0.3, 1.0])
    data = rj.sweep(sgd, start, 6, flows=flows, metrics=metrics, **options)
    return data, len(calls)


def test_a_metric_is_compiled_once_for_models_that_are_alike():
    """Though the stable flow has one end of an oscillation, and the others two."""
    few, once = measured(["stable"], grid={"lr": 0.4})
    more, calls = measured(["stable", "rod", "modulated", "edge"], grid={"lr": 0.4})
    assert once == calls
    for name in ("run", "stable"):
        np.testing.assert_array_equal(
            few.sharpness_ratio.sel(flow=name), more.sharpness_ratio.sel(flow=name)
        )


def test_one_lane_is_as_one_of_several():
    one, _ = measured(["modulated"], grid={"lr": [0.4]})
    two, _ = measured(["modulated"], grid={"lr": [0.4, 0.1]})
    assert one.sizes["lr"] == 1
    for name, values in one.drop_vars("lr").items():
        np.testing.assert_allclose(
            values.values[:, 0], two[name].values[:, 0], rtol=1e-9, atol=1e-14
        )
