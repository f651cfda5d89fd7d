"""A sweep as one vmapped program against loops over its lanes.

Gradient descent and the modulated flow on the reference problem (digits MLP,
64-16-16-10, tanh, 100 samples) at 32 learning rates, 20 steps and then 240 compared:

- `rj.sweep`, one program for all lanes;
- a Python loop over the learning rates of one jitted function of the same run, flow and
  comparison;
- a Python loop that calls `rj.warm_up`, `descend`, `integrate` and `compare`;
- a Python loop of plain Optax descent, jitted, without any flow or record.

Wall times are warm, the best of several taken in turn; the first call's extra time is
its compilation. On CPU the sweep has a device for every core unless --devices is given.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --float64 --devices 1
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rodjax as rj
from rodjax.sweeps import _program as program

START, STEPS, SUBSTEPS, REPEATS = 20, 240, 4, 3


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--devices", type=int, default=os.cpu_count())
    parser.add_argument("--float64", action="store_true", help="float32 if not given")
    parser.add_argument("--out", default="sweep.json")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    os.environ.setdefault("NPROC", str(2 * options.devices))
    jax.config.update("jax_enable_x64", options.float64)
    jax.config.update("jax_default_matmul_precision", "highest")

    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flow = rj.flows.modulated(dynamics)
    lrs = np.geomspace(0.05, 0.8, options.lanes)

    def sweep() -> Any:
        return rj.sweep(
            dynamics,
            problem.params,
            STEPS,
            grid={"lr": lrs},
            flows={"modulated": flow},
            start=START,
            substeps=SUBSTEPS,
            time_chunk=STEPS,
        )

    def calls(lr):
        window = rj.warm_up(dynamics, problem.params, START, lr=lr)
        run = rj.descend(dynamics, window, STEPS, lr=lr)
        path = rj.integrate(flow, window, STEPS, lr=lr, substeps=SUBSTEPS)
        found = rj.compare(path, run)
        return found.distance, found.flow, found.run

    single = jax.jit(calls)

    @jax.jit
    def optax_alone(lr):
        optimizer = optax.sgd(lr)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(problem.loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        first = (problem.params, optimizer.init(problem.params))
        return jax.lax.scan(step, first, length=START + STEPS)[0][0]

    def over(one: Callable[[Any], Any]) -> Callable[[], Any]:
        # Waiting for each, as a loop that looks at its results does.
        return lambda: [jax.block_until_ready(one(jnp.asarray(lr))) for lr in lrs]

    built, build = [], program.build

    def watched(*arguments: Any) -> program.Program:
        built.append(build(*arguments))
        return built[-1]

    program.build = watched
    ways = {
        "sweep": sweep,
        "loop": over(single),
        "loop of calls": over(calls),
        "Optax loop": over(optax_alone),
    }
    first = {name: seconds(run) for name, run in ways.items()}
    warm = {name: float("inf") for name in ways}
    for _ in range(REPEATS):
        # In turn, so that whatever else the machine does slows all.
        warm = {name: min(best, seconds(ways[name])) for name, best in warm.items()}

    data = sweep()
    alone = np.stack([single(jnp.asarray(lr))[0] for lr in lrs])
    compared = data.distance.sel(flow="modulated").values
    device = jax.devices()[0]
    needs = single.lower(jnp.asarray(lrs[0])).compile().memory_analysis()
    results = {
        "lanes": options.lanes,
        "devices": len(jax.devices()),
        "device": device.device_kind,
        "float64": options.float64,
        "seconds": warm,
        "compilation": {name: first[name] - warm[name] for name in ways},
        "loop / sweep": warm["loop"] / warm["sweep"],
        "sweep / Optax loop": warm["sweep"] / warm["Optax loop"],
        "with compilation, loop / sweep": first["loop"] / first["sweep"],
        "programs compiled": build.cache_info().misses,
        "MB on each device, sweep": built[-1].bytes / 1e6,
        "MB, one lane of the loop": needs.temp_size_in_bytes / 1e6,
        "largest difference": float(np.nanmax(np.abs(compared - alone))),
    }
    print(f"{results['lanes']} lanes on {results['devices']} x {results['device']}")
    print(f"{'':14}{'warm s':>10}{'compile s':>12}{'/ sweep':>10}")
    for name in ways:
        ratio = warm[name] / warm["sweep"]
        print(
            f"{name:14}{warm[name]:10.3f}{results['compilation'][name]:12.2f}"
            f"{ratio:10.2f}"
        )
    for name, value in list(results.items())[6:]:
        print(f"{name}: {value:.4g}")
    with open(options.out, "w") as file:
        json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
