"""What a device makes of it: accuracy, cost by size, sweeps, watching; in nine minutes.

- `accuracy`: the reference row and three rows of `accuracy.py` in float32: distance of
  the modulated flow over that of the stable one, final and mean.
- `cost`: milliseconds a step of Optax's own descent, `descend` and two flows on MLPs of
  10^4 to 10^8 parameters (batch of 128), and times Optax's own.
- `sweep`: gradient descent and the modulated flow at 32, 256 and 1024 learning rates in
  one program, against a loop of one jitted function of the same (of eight lanes, times
  their number), on the reference problem.
- `watch`: a training step of a CNN, watched every 20 steps, over one that is not.

Times are warm, the best of several in turn; what the first call takes more is
compilation. A part that fails is recorded with its message, and the next goes on; what
is measured is written after each part.

    python benchmarks/accelerator.py
    python benchmarks/accelerator.py --parts cost,sweep --tiny
"""

import itertools
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, seconds, words, write
from _rows import NETWORKS, OPTIMIZERS

import rodjax as rj

ROWS = {
    "mlp-gd": (0.6, 20, 240),
    "mlp-rmsprop": (8e-4, 20, 600),
    "mlp-adam": (0.025, 20, 600),
    "cnn-gd": (0.38, 20, 400),
}
SIZES = {"1e4": 10**4, "1e6": 10**6, "1e7": 10**7, "1e8": 10**8}
LANES = (32, 256, 1024)
BATCH, DEPTH, WIDE = 128, 4, 64
REPEATS = 3


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "accelerator.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--tiny", action="store_true", help="small sizes, as a trial")
    options = parser.parse_args()
    # What rodjax does anyway, for Optax's own descent and training beside it.
    jax.config.update("jax_default_matmul_precision", "highest")
    began, device = time.perf_counter(), jax.devices()[0]
    found: dict[str, Any] = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "tiny": options.tiny,
    }
    print(f"{device.device_kind}, jax {jax.__version__}")
    for name in words(options.parts):
        try:
            found[name] = PARTS[name](options.tiny)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        jax.clear_caches()
        found["seconds"] = time.perf_counter() - began
        write(options.out, found, indent=1)
    print(f"\n{found['seconds']:.0f} s in all")


def accuracy(tiny: bool) -> dict[str, Any]:
    """The modulated flow's distance over the stable one's, by rows."""
    print("\n" + head(["row", "final", "mean", "stable's final", "seconds"]))
    found = {}
    for name, (lr, warmup, most) in ROWS.items():
        began = time.perf_counter()
        network, optimizer = name.split("-", 1)
        problem = NETWORKS[network](rj.problems.digits(100 if network == "mlp" else 50))
        dynamics = rj.dynamics(OPTIMIZERS[optimizer], problem.loss)
        steps = 20 if tiny else most
        start = rj.warm_up(dynamics, problem.params, warmup, lr=lr)
        run = rj.descend(dynamics, start, steps, lr=lr, every=5)
        flows = {"stable": rj.flows.stable, "modulated": rj.flows.modulated}
        summaries = {}
        for flow, build in flows.items():
            path = rj.integrate(build(dynamics), start, steps, lr=lr, every=5)
            summaries[flow] = rj.compare(run, path).summary()
        own, base = summaries["modulated"], summaries["stable"]
        keys = ("final_distance", "mean_distance")
        final, mean = (own[key] / base[key] for key in keys)
        took = time.perf_counter() - began
        found[name] = {"final": final, "mean": mean, "seconds": took}
        found[name]["stable's final distance"] = base["final_distance"]
        cells = f"{final:.3f}", f"{mean:.3f}", f"{base['final_distance']:.3g}"
        print(row([name, *cells, f"{took:.0f}"]), flush=True)
    return found


def network(parameters: int) -> tuple[Callable[[Any], Any], Any]:
    """The loss of an MLP of about so many parameters on a batch of noise."""
    # 64 w + 2 w^2 + 10 w parameters of four layers, w wide.
    width = int((-74 + (74**2 + 8 * parameters) ** 0.5) / 4)
    sizes = [WIDE, width, width, width, 10]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = list(itertools.pairwise(sizes))
    params = [
        {"w": jax.random.normal(key, pair) / pair[0] ** 0.5, "b": jnp.zeros((1, n))}
        for key, pair, n in zip(keys, pairs, sizes[1:], strict=False)
    ]
    data = jax.random.normal(keys[-1], (BATCH, WIDE))
    target = jax.random.normal(jax.random.key(1), (BATCH, 10))

    def loss(params):
        x = data
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return 0.5 * jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - target) ** 2)

    return loss, params


def descent(optimizer: optax.GradientTransformation, loss: Any, steps: int) -> Any:
    """Optax alone, in one compiled scan."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return jax.jit(run)


def cost(tiny: bool) -> dict[str, Any]:
    """Milliseconds a step by size, and times plain descent's."""
    print("\n" + head(["parameters", "", "ms a step", "times Optax", "compile s"]))
    found = {}
    for name, size in SIZES.items():
        if tiny and size > 10**6:
            continue
        found[name] = cost_of(size, 8 if tiny or size > 10**7 else 40)
        for way, own in found[name].items():
            cells = f"{own['ms a step']:.3f}", f"{own['times Optax']:.2f}"
            print(row([name, way, *cells, f"{own['compilation']:.1f}"]), flush=True)
        jax.clear_caches()
    return found


def cost_of(size: int, steps: int) -> dict[str, Any]:
    """The same for one size."""
    loss, params = network(size)
    sgd = optax.sgd(0.1)
    dynamics = rj.dynamics(sgd, loss)
    start = jax.block_until_ready(rj.warm_up(dynamics, params, 3))
    plain = descent(sgd, loss, steps)
    # Nothing of the parameters is kept, and nothing looked at but at the end.
    common: dict[str, Any] = {"every": steps, "keep": lambda params: None}

    def solved(flow: rj.Flow) -> Any:
        return rj.integrate(flow, start, steps, **common).metrics["loss"]

    def descended() -> Any:
        return rj.descend(dynamics, start, steps, **common).metrics["loss"]

    stable, modulated = rj.flows.stable(dynamics), rj.flows.modulated(dynamics)
    ways: dict[str, Callable[[], Any]] = {
        "Optax": lambda: plain(params),
        "descend": descended,
        "stable": lambda: solved(stable),
        "modulated": lambda: solved(modulated),
    }
    first, warm = timed(ways)
    return {
        way: {
            "ms a step": 1e3 * warm[way] / steps,
            "times Optax": warm[way] / warm["Optax"],
            "compilation": first[way] - warm[way],
        }
        for way in ways
    }


def sweep(tiny: bool) -> dict[str, Any]:
    """Lanes in one program against a loop of the same."""
    print("\n" + head(["lanes", "sweep s", "loop s", "loop / sweep", "compile s"]))
    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flow, steps, found = rj.flows.modulated(dynamics), 40 if tiny else 240, {}

    @jax.jit
    def single(lr):
        window = rj.warm_up(dynamics, problem.params, 20, lr=lr)
        run = rj.descend(dynamics, window, steps, lr=lr)
        compared = rj.compare(run, rj.integrate(flow, window, steps, lr=lr))
        return compared.distance, compared.flow, compared.run

    for lanes in (4,) if tiny else LANES:
        lrs = np.geomspace(0.05, 0.8, lanes)

        def all_at_once(lrs=lrs):
            return rj.sweep(
                dynamics,
                problem.params,
                steps,
                grid={"lr": lrs},
                flows={"modulated": flow},
                warmup=20,
                time_chunk=steps,
            )

        some = np.geomspace(0.05, 0.8, 8)
        ways: dict[str, Callable[[], Any]] = {
            "sweep": all_at_once,
            "loop": lambda some=some: [
                jax.block_until_ready(single(jnp.asarray(lr))) for lr in some
            ],
        }
        first, warm = timed(ways)
        loop = warm["loop"] * lanes / len(some)
        found[str(lanes)] = {
            "sweep seconds": warm["sweep"],
            "loop seconds": loop,
            "loop / sweep": loop / warm["sweep"],
            "compilation": first["sweep"] - warm["sweep"],
        }
        cells = [f"{x:.2f}" for x in found[str(lanes)].values()]
        print(row([str(lanes), *cells]), flush=True)
    return found


def watch(tiny: bool) -> dict[str, Any]:
    """A training step of a CNN on batches, watched and not."""
    print("\n" + head(["", "ms a step", "times unwatched", "compile s"]))
    data = rj.problems.digits(512)
    problem = NETWORKS["cnn"](data)
    steps, adam = 20 if tiny else 200, optax.adam(1e-3)
    loss = problem.loss

    def training(optimizer):
        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(loss)(params)
            extra = {"value": value, "value_fn": loss} if optimizer is not adam else {}
            updates, state = optimizer.update(grad, state, params, **extra)
            return (optax.apply_updates(params, updates), state), value

        def run(params):
            return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]

        return jax.jit(run)

    runs = {
        "unwatched": training(adam),
        "watched, every 20": training(rj.training.watch(adam, every=20)),
    }
    first, warm = timed({n: (lambda f=f: f(problem.params)) for n, f in runs.items()})
    found = {
        name: {
            "ms a step": 1e3 * warm[name] / steps,
            "times unwatched": warm[name] / warm["unwatched"],
            "compilation": first[name] - warm[name],
        }
        for name in runs
    }
    for name, own in found.items():
        print(row([name, *(f"{x:.3f}" for x in own.values())]), flush=True)
    return found


def timed(
    ways: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the first call of each, and the best of several in turn."""
    first = {name: seconds(run) for name, run in ways.items()}
    warm = {name: float("inf") for name in ways}
    for _ in range(REPEATS):
        warm = {name: min(best, seconds(ways[name])) for name, best in warm.items()}
    return first, warm


PARTS: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "accuracy": accuracy,
    "cost": cost,
    "sweep": sweep,
    "watch": watch,
}

if __name__ == "__main__":
    main()
