"""A small sweep, and processes that run it for the tests that need some of their own.

A process prints a JSON line at every chunk, and saves what every sweep returned.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NONE = "-"


def options(words):
    """Those of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", type=Path, help="folder for the results")
    parser.add_argument("--out", nargs="+", default=[NONE], help="one of each sweep")
    parser.add_argument("--stop", type=int, help="the first sweep after so many chunks")
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    parser.add_argument("--lane-chunk", type=int, nargs="+", default=[0], help="0: all")
    parser.add_argument("--time-chunk", type=int, default=5)
    parser.add_argument("--keep", type=int, default=4, help="numbers kept a moment")
    parser.add_argument("--flow", default="modulated")
    args = parser.parse_args([str(word) for word in words])
    # One given for all sweeps, or one for each.
    sweeps = max(len(args.out), len(args.lane_chunk))
    args.out = (args.out * sweeps)[:sweeps]
    args.lane_chunk = (args.lane_chunk * sweeps)[:sweeps]
    return args


@functools.cache
def problem(flow, keep):
    """Dynamics, initial parameters, flows and what is kept; lanes of it diverge."""
    import jax
    import jax.numpy as jnp
    import optax

    import rodjax as rj

    def loss(w):
        return w**2 @ jnp.array([1.5, 1.0, 0.5, 0.25]) + 0.1 * jnp.sum(w) ** 4

    sgd = rj.dynamics(optax.sgd, loss)
    draw = lambda key: jax.random.normal(key, (4,))
    flows = {flow: getattr(rj.flows, flow)(sgd)}
    return sgd, draw, flows, lambda w: jnp.resize(w, keep)


class Stopped(Exception):
    """Raised by a sweep's progress, to stop it."""


def sweep(args, i=0, out=None, progress=None):
    """The result of the i-th sweep, of 15 lanes."""
    import rodjax as rj

    sgd, draw, flows, keep = problem(args.flow, args.keep)
    return rj.sweep(
        sgd,
        None,
        20,
        draw=draw,
        grid={"lr": [0.05, 0.3, 0.6], "seed": range(5)},
        flows=flows,
        keep=keep,
        lane_chunk=args.lane_chunk[i] or None,
        time_chunk=args.time_chunk,
        out=out,
        progress=progress,
    )


def values(data):
    """Name -> the values of every variable and coordinate, as arrays."""
    return {str(name): data[name].values for name in sorted(data.variables)}


def same_bits(found, expected):
    """The values of one result, against those of another."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name


def start(*words):
    """Start a process with these words on its command line, its log in its folder."""
    words = [str(word) for word in words]
    save = options(words).save
    save.mkdir(parents=True, exist_ok=True)
    with open(save / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *words], stdout=log, stderr=subprocess.STDOUT
        )
    process.save = save
    return process


@functools.cache
def alone(*words):
    """What one device in one process comes to, by the lanes of a chunk."""
    with tempfile.TemporaryDirectory() as folder:
        wait([start("--save", folder, *words)])
        chunks = options(words).lane_chunk
        return {lanes: saved(Path(folder), i) for i, lanes in enumerate(chunks)}


def log(save):
    """All that a process has printed."""
    return (save / "log").read_text()


def said(save):
    """The lines of JSON that it has."""
    lines = log(save).splitlines(keepends=True)
    return [json.loads(x) for x in lines if x.startswith("{") and x.endswith("}\n")]


def saved(save, sweep=0):
    """The values of one of the results that it has saved."""
    with np.load(save / f"{sweep}.npz") as found:
        return dict(found)


def wait(processes, until=lambda: False, seconds=120.0):
    """Until all have ended well, or something else; at the latest kill them all."""
    late = time.monotonic() + seconds
    try:
        running = True
        while running and not until():
            time.sleep(0.001)
            codes = [process.poll() for process in processes]
            running = None in codes
            failed = any(codes) or time.monotonic() > late
            assert not failed, [log(process.save) for process in processes]
    finally:
        kill(processes)


def kill(processes):
    """By SIGKILL, and wait until they are gone."""
    for process in processes:
        process.kill()
        process.wait()


def about(program):
    """How a program's outputs lie on devices, its operations, what it is known by."""
    import jax

    outputs = jax.tree.leaves((program.places, program.rows))
    shardings = jax.tree.leaves(program.run.output_shardings)
    laid = list(zip(outputs, shardings, strict=True))
    return {
        "widths": [*{sharding.shard_shape(x.shape)[0] for x, sharding in laid}],
        "devices": [*{len(sharding.device_set) for _, sharding in laid}],
        "digests": program.digests,
        "operations": [*{*re.findall(r" ([a-z-]+)\(", program.run.as_text())}],
    }


def main(args):
    """Sweep into every `out` and save what was returned."""
    import jax

    jax.config.update("jax_enable_x64", True)
    if args.processes > 1:
        address = f"127.0.0.1:{args.port}"
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=args.processes,
            process_id=args.process,
            coordinator_bind_address=address,
        )
    for i, out in enumerate(args.out):
        chunks = []

        def progress(status, i=i, chunks=chunks):
            facts = status._asdict() | {"sweep": i, "program": about(status.program)}
            print("\n" + json.dumps(facts), flush=True)
            chunks.append(status.done)
            if i == 0 and len(chunks) == args.stop:
                raise Stopped

        with (
            contextlib.suppress(Stopped),
            sweep(args, i, None if out == NONE else out, progress) as data,
        ):
            np.savez(args.save / f"{i}.npz", **values(data))


if __name__ == "__main__":
    chosen = options(sys.argv[1:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Not the tests' own: equal bits are promised of the compiler that users have.
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 "
        f"--xla_force_host_platform_device_count={chosen.devices}"
    )
    main(chosen)
