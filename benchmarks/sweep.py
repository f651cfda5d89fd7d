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

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, seconds, write

import rodjax as rj

WARMUP, REPEATS = 20, 3


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "sweep.json")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--devices", type=int, default=os.cpu_count())
    parser.add_argument("--float64", action="store_true", help="float32 if not given")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    os.environ.setdefault("NPROC", str(2 * options.devices))
    jax.config.update("jax_enable_x64", options.float64)

    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flow = rj.flows.modulated(dynamics)
    lrs = np.geomspace(0.05, 0.8, options.lanes)
    steps, told = options.steps, []

    def sweep() -> Any:
        return rj.sweep(
            dynamics,
            problem.params,
            steps,
            grid={"lr": lrs},
            flows={"modulated": flow},
            warmup=WARMUP,
            time_chunk=steps,
            progress=told.append,
        )

    def calls(lr):
        window = rj.warm_up(dynamics, problem.params, WARMUP, lr=lr)
        run = rj.descend(dynamics, window, steps, lr=lr)
        path = rj.integrate(flow, window, steps, lr=lr)
        found = rj.compare(run, path)
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
        return jax.lax.scan(step, first, length=WARMUP + steps)[0][0]

    def over(one: Callable[[Any], Any]) -> Callable[[], Any]:
        # Waiting for each, as a loop that looks at its results does.
        return lambda: [jax.block_until_ready(one(jnp.asarray(lr))) for lr in lrs]

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
    programs = {id(status.program.run): status.program for status in told}
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
        "programs of the sweep": len(programs),
        "lanes at a time": told[-1].program.lanes,
        "seconds to build a program": told[-1].program.seconds,
        "MB on each device, sweep": told[-1].program.bytes / 1e6,
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
    write(options.out, results, indent=2)


if __name__ == "__main__":
    main()
