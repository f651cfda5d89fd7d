"""What watching costs: time of a step and memory, beside the same loop without it.

Adam on random data of the digits' shape, batches of 128, float32: MLPs of 10^4 and
10^6 parameters and a CNN. A Python loop of one jitted step with donated state, as users
write it, for every way of watching in turn; the best of several rounds each, so that
whatever else the machine does slows all. Ratios are to the loop that is not watched.

- free: `update_ratio` and the full-batch `realized_edge`, every step.
- tracked: those and `oscillation`, its direction found once.
- default: what is watched by default, at every 20th step.
- default, 1 product; default, every 100: with these settings.
- all: all but the naive alternation, at every 20th step, with a probe set of 128.

Memory in copies of the parameters: that of the compiled step beyond its arguments and
results, and what the state holds beside the optimizer's.

    python benchmarks/watch.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, seconds, write
from flax import linen

from rodjax.training import QUANTITIES, watch

BATCH, STEPS = 128, 40
CHEAP = ("update_ratio", "realized_edge")
APART = ("alternation", "block_sharpness", "share")
WAYS: dict[str, dict[str, Any]] = {
    "free": {"quantities": CHEAP, "full_batch": True},
    "tracked": {
        "quantities": (*CHEAP, "oscillation", "sharpness"),
        "full_batch": True,
        "every": 10**9,
    },
    "default": {},
    "default, 1 product": {"products": 1},
    "default, every 100": {"every": 100},
    "all": {"quantities": [name for name in QUANTITIES if name not in APART]},
}


class MLP(linen.Module):
    """Dense layers with tanh."""

    widths: tuple[int, ...]

    @linen.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = jnp.tanh(linen.Dense(width)(x))
        return linen.Dense(10)(x)


class CNN(linen.Module):
    """Two convolutions 3 x 3, each pooled."""

    channels: tuple[int, ...] = (32, 64)

    @linen.compact
    def __call__(self, x):
        for channels in self.channels:
            x = jnp.tanh(linen.Conv(channels, (3, 3))(x))
            x = linen.avg_pool(x, (2, 2), strides=(2, 2))
        return linen.Dense(10)(x.reshape(len(x), -1))


MODELS = {
    "MLP 1e4": MLP((96, 32)),
    "MLP 1e6": MLP((1000, 900)),
    "CNN": CNN(),
}


def bytes_of(tree: Any) -> int:
    """Of all its arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Loop:
    """A loop with its state; `run` goes on by some steps."""

    def __init__(self, model: linen.Module, settings: dict[str, Any] | None):
        draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
        batch = draw(0, BATCH, 8, 8, 1), draw(1, BATCH, 10)
        other = draw(2, BATCH, 8, 8, 1), draw(3, BATCH, 10)
        error = lambda w, x, y: 0.5 * jnp.mean((model.apply(w, x) - y) ** 2)
        optimizer = optax.adam(1e-4)
        if settings is not None:
            probing = "noise_interaction" in (settings.get("quantities") or ())
            probe_fn = (lambda w: error(w, *other)) if probing else None
            optimizer = watch(optimizer, probe_fn=probe_fn, **settings)

        def step(params, state, x, y):
            value_fn = lambda w: error(w, x, y)
            value, grad = jax.value_and_grad(value_fn)(params)
            extra = {} if settings is None else {"value": value, "value_fn": value_fn}
            updates, state = optimizer.update(grad, state, params, **extra)
            return optax.apply_updates(params, updates), state, value

        params = model.init(jax.random.key(4), batch[0])
        state = optimizer.init(params)
        self.size = bytes_of(params)
        own = state if settings is None else state.inner
        self.kept = (bytes_of(state) - bytes_of(own)) / self.size
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *batch)
        self.seconds_to_compile = seconds(lambda: self._compile(lowered))
        self.temporary = self.step.memory_analysis().temp_size_in_bytes / self.size
        self.batch, self.state = batch, (params, state)

    def _compile(self, lowered: Any) -> None:
        self.step = lowered.compile()

    def run(self, steps: int) -> Any:
        for _ in range(steps):
            *self.state, value = self.step(*self.state, *self.batch)
        return value


def measured(model: linen.Module, steps: int, rounds: int) -> dict[str, Any]:
    """Of one model: each way's cost."""
    ways = {"not watched": None, **WAYS}
    loops = {name: Loop(model, settings) for name, settings in ways.items()}
    best = dict.fromkeys(loops, float("inf"))
    ratios: dict[str, list[float]] = {name: [] for name in loops}
    for again in range(rounds + 1):
        took = {}
        for name, loop in loops.items():
            # All probes of every 100 steps within the steps of one round.
            many = 100 if "100" in name else steps
            took[name] = seconds(lambda loop=loop, many=many: loop.run(many)) / many
        if again:
            best = {name: min(best[name], took[name]) for name in loops}
            for name in loops:
                ratios[name].append(took[name] / took["not watched"])
    plain = best["not watched"]
    found = {
        name: {
            "microseconds": 1e6 * best[name],
            "over plain": best[name] / plain - 1,
            "median over plain": float(np.median(ratios[name])) - 1,
            "temporary copies": loop.temporary,
            "copies in the state": loop.kept,
            "seconds to compile": loop.seconds_to_compile,
        }
        for name, loop in loops.items()
    }
    return {"parameters": loops["free"].size // 4, "ways": found}


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "watch.json")
    parser.add_argument("--steps", type=int, default=STEPS, help="a round, times 20")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    for name, model in MODELS.items():
        results[name] = found = measured(model, options.steps, options.rounds)
        print(f"\n{name}, {found['parameters']} parameters")
        print(head(["", "us / step", "best %", "median %", "temp", "state", "compile"]))
        for way, x in found["ways"].items():
            cells = [
                f"{x['microseconds']:.0f}",
                f"{100 * x['over plain']:.1f}",
                f"{100 * x['median over plain']:.1f}",
                f"{x['temporary copies']:.1f}",
                f"{x['copies in the state']:.2f}",
                f"{x['seconds to compile']:.1f} s",
            ]
            print(row([way, *cells]), flush=True)
        write(options.out, results, indent=2)


if __name__ == "__main__":
    main()
