"""Where mini-batch training settles, and whether an instability is seen in advance.

The reference MLP on 1000 digits, float32, watched on fresh batches, with all samples as
the probe set.

1. SGD with batches of 8 and 64, heavy ball with small and large ones: batch sharpness,
   noise interaction and full-batch sharpness over training, beside 2/eta for SGD and
   2(1-b)/eta and 2(1+b)/eta for heavy ball.
2. Spikes: SGD, whose rate is raised 2 to 8 times in mid-run, from several seeds, and
   as many runs without it, a probe at every step: the step from the raise on at which
   the status first says "unstable", the one at which the loss on all samples has
   doubled, and how often it says so without, and before the raise.

    python benchmarks/watch_noise.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, words, write

import rodjax as rj
from rodjax.training import STATUS, report, watch

SAMPLES = 1000
UNSTABLE = STATUS.index("unstable")
#: Name -> batch, rate, momentum.
RUNS: dict[str, tuple[int, float, float]] = {
    "SGD, 8": (8, 0.7, 0.0),
    "SGD, 64": (64, 0.8, 0.0),
    "heavy ball 0.9, 8": (8, 0.07, 0.9),
    "heavy ball 0.9, 1000": (1000, 1.0, 0.9),
}
SETTLES = ("batch_sharpness", "sharpness")
#: What the rate is raised by.
TIMES = (2.0, 3.0, 4.0, 6.0, 8.0)
NAMES = ("batch_sharpness", "noise_interaction", "sharpness", "sharpness_ratio")
SHOWN = (*NAMES[:3], "sharpness_ratio", "batch_sharpness_error", "status")


class Digits:
    """The problem, by samples."""

    def __init__(self):
        data = rj.problems.digits(SAMPLES)
        problem = rj.problems.digits_mlp(SAMPLES)
        self.params, self.loss = problem.params, problem.loss
        self.inputs = jnp.reshape(data.inputs, (SAMPLES, -1))
        self.targets = data.targets

    def batch_loss(self, params: Any, which: Any) -> Any:
        """Half the squared error, averaged over a batch."""
        x, layers = self.inputs[which], list(params["layers"].values())
        for i, layer in enumerate(layers):
            x = x @ layer["kernel"] + layer["bias"][None]
            x = jnp.tanh(x) if i + 1 < len(layers) else x
        return 0.5 * jnp.mean(jnp.sum((x - self.targets[which]) ** 2, 1))


def course(
    digits: Digits, batch: int, optimizer: Any, steps: int, every: int, **settings: Any
) -> Any:
    """A compiled run: seed, rates of all steps -> what is reported at every probe."""
    tx = watch(optimizer, every=every, probe_fn=digits.loss, **settings)

    def step(carry, inputs):
        params, state = carry
        key, rate = inputs
        state.inner.hyperparams["learning_rate"] = rate
        which = jax.random.choice(key, SAMPLES, (batch,), replace=False)
        value_fn = lambda w: digits.batch_loss(w, which)
        grad = jax.grad(value_fn)(params)
        updates, state = tx.update(grad, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    def probes(carry, inputs):
        carry, _ = jax.lax.scan(step, carry, inputs)
        params, state = carry
        return carry, {**report(state), "loss": digits.loss(params)}

    @jax.jit
    def run(seed, rates):
        keys = jax.random.split(jax.random.key(seed), steps)
        inputs = jax.tree.map(
            lambda x: x.reshape(-1, every, *x.shape[1:]), (keys, rates)
        )
        start = digits.params, tx.init(digits.params)
        return jax.lax.scan(probes, start, inputs)[1]

    return run


def settled(digits: Digits, steps: int, every: int) -> dict[str, Any]:
    """The first part."""
    found = {}
    for name, (batch, rate, momentum) in RUNS.items():
        optimizer = optax.inject_hyperparams(optax.sgd)(rate, momentum=momentum)
        run = course(digits, batch, optimizer, steps, every, quantities=NAMES)
        path = run(0, jnp.full(steps, rate))
        path = {key: np.asarray(path[key], float) for key in (*SHOWN, "loss")}
        late = {key: float(np.mean(x[-len(x) // 4 :])) for key, x in path.items()}
        levels = {
            "2(1-b)/eta": 2 * (1 - momentum) / rate,
            "2(1+b)/eta": 2 * (1 + momentum) / rate,
        }
        found[name] = {"levels": levels, "late": late, "path": path}
        cells = [f"{x:.2f}" for x in levels.values()]
        cells += [f"{late[key]:.2f}" for key in NAMES] + [f"{late['loss']:.2g}"]
        print(row([name, *cells]), flush=True)
    return found


def spikes(
    digits: Digits, seeds: int, steps: int, every: int, times: float
) -> dict[str, Any]:
    """The second part."""
    batch, rate = 64, 0.2
    optimizer = optax.inject_hyperparams(optax.sgd)(rate)
    names = ("sharpness_ratio", "realized_edge")
    run = course(digits, batch, optimizer, steps, every, quantities=names)
    calm = jnp.full(steps, rate)
    raised = calm.at[steps // 2 :].set(times * rate)
    rows = []
    for seed in range(seeds):
        said, loss, ratio = [], [], []
        for rates in (calm, raised):
            path = run(seed, rates)
            said.append(np.asarray(path["status"]) == UNSTABLE)
            loss.append(np.asarray(path["loss"], float))
            ratio.append(np.asarray(path["sharpness_ratio"], float))
        half = steps // 2 // every
        before = np.median(loss[1][half - 10 : half])
        high = loss[1][half:] > 2 * before
        spike = every * int(np.argmax(high)) if high.any() else None
        word = every * int(np.argmax(said[1][half:])) if said[1][half:].any() else None
        rows.append(
            {
                "seed": seed,
                "spike after": spike,
                "unstable after": word,
                "highest loss over that before": float(loss[1][half:].max() / before),
                "highest ratio": float(np.nanmax(ratio[1][half:])),
                "probes unstable in the calm run": int(said[0].sum()),
                "probes unstable before the raise": int(said[1][:half].sum()),
            }
        )
        print(row(str(x) for x in rows[-1].values()), flush=True)
    return {"every": every, "probes of a run": steps // every, "rows": rows}


def drawn(found: dict[str, Any], every: int, file: Any) -> None:
    """The first part as a figure."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4))
    for axis, (name, x) in zip(axes, found.items(), strict=True):
        path = x["path"]
        time = every * np.arange(1, len(path["loss"]) + 1)
        for key, color in zip(NAMES[:3], ("C0", "C2", "C1"), strict=True):
            axis.plot(time, path[key], color=color, label=key.replace("_", " "))
        low, high = x["levels"].values()
        axis.axhline(low, color="k", linestyle="--", linewidth=1)
        if high != low:
            axis.axhline(high, color="k", linestyle=":", linewidth=1)
        # Noise over a vanishing gradient would hide all else.
        axis.set_ylim(0, 1.5 * max(low, *(path[key][-1] for key in SETTLES)))
        axis.set(title=name, xlabel="step")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measure, print, draw and write."""
    parser = arguments(__doc__, "watch_noise.json")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--parts", default="settled,spikes")
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    digits = Digits()
    parts, results = words(options.parts), {}
    if "settled" in parts:
        print(head(["late", "2(1-b)/eta", "2(1+b)/eta", *NAMES, "loss"]))
        found = settled(digits, options.steps, options.every)
        drawn(found, options.every, options.out.with_suffix(".png"))
        results["settled"] = found
    titles = [
        "seed",
        "spike after",
        "unstable after",
        "loss",
        "ratio",
        "calm",
        "before",
    ]
    for times in TIMES if "spikes" in parts else ():
        print(f"\nrate times {times}, a probe at every step\n" + head(titles))
        results[f"spikes, {times}"] = spikes(digits, options.seeds, 2000, 1, times)
    write(options.out, results)


if __name__ == "__main__":
    main()
