"""Parameters over several devices, data over others: as on one, and where they are."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import sharded_model as model
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rodjax as rj

DEVICES = 8
WORKER = Path(__file__).with_name("sharded_model.py")


def start(*words, devices=DEVICES):
    # Twice as many threads as devices, which else wait for each other.
    more = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "NPROC": str(2 * devices),
    }
    words = [sys.executable, str(WORKER), *map(str, words)]
    return subprocess.Popen(words, env=os.environ | more)


def wait(*processes):
    try:
        assert [process.wait(600) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


PAIRS = "pairs", "preconditioned pairs"
# One process for a few cases; tensor-style those that could go another way.
GROUPS = {
    "runs": ("fsdp", "descend", "stable", "threshold"),
    "modulated": ("fsdp", "modulated", *model.DRAWN),
    "rod and edge": ("fsdp", "rod", "edge"),
    "central": ("fsdp", "central"),
    "curvature": ("fsdp", "sharpness", "products", "ratio"),
    "pairs": ("fsdp", *PAIRS),
    "watch": ("fsdp", "watch"),
    "tensor": ("tensor", "descend", "modulated", "edge", "sharpness", *PAIRS, "watch"),
    "central, tensor": ("tensor", "central"),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", list(GROUPS))
def test_equal_to_one_device_and_nothing_is_gathered(group):
    wait(start(*GROUPS[group]))


# Few at a time: all that they take is compilation, in both.
TWO = "stable products sharpness", "descend", "watch"


@pytest.mark.slow
@pytest.mark.parametrize("names", TWO)
def test_two_processes(names):
    """Each holds its own parts, and comes to what one device does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = names.split()
    wait(*[start("fsdp", *words, f"{port}:{i}", devices=4) for i in (0, 1)])


def explicit():
    """Parameters on a mesh as newer versions of jax.make_mesh make it."""
    kind = (AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("x",), axis_types=kind, devices=jax.devices()[:1])
    place = NamedSharding(mesh, PartitionSpec("x"))
    return {"w": jax.device_put(jnp.ones(4), place)}


LOSS = lambda params: jnp.sum(params["w"] ** 4)
SGD = rj.dynamics(optax.sgd(0.1), LOSS)
ENTRIES = {
    "descend": lambda w: rj.descend(SGD, w, 2),
    "integrate": lambda w: rj.integrate(rj.flows.stable(SGD), w, 2),
    "sharpness": lambda w: rj.sharpness(LOSS, w),
    "eigenpairs": lambda w: rj.hessian_eigenpairs(LOSS, w, 2),
    "init": SGD.init,
    "threshold": lambda w: rj.threshold(SGD, w),
    "predictability": lambda w: rj.predictability(SGD, w, 2),
    "watch": lambda w: rj.training.watch(optax.sgd(0.1)).init(w),
}


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_an_explicit_mesh_is_refused_with_what_to_make(entry):
    with pytest.raises(ValueError, match="axis_types="):
        ENTRIES[entry](explicit())
