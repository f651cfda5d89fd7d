"""DAL-p trains the digits MLP at learning rates that plain gradient descent cannot.

Full batch, then mini-batches, nothing tuned. For each power p, and for gradient descent
at fixed rates, prints the final loss, the instability (the largest rise of the loss in
one step, and all rises together) and the learning rates, and draws stability against p.

    python benchmarks/dal.py --out figures
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, write
from matplotlib import colormaps
from matplotlib.figure import Figure

import rodjax as rj
from rodjax.transforms import dal

POWERS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
RATES = (0.3, 0.6, 1.0, 1.2, 1.5, 1.7, 1.9, 2.0, 5.0)
SAMPLES, BATCH = 100, 25
# Runs of gradient descent in the picture: at the edge, and where DAL's rates go.
DRAWN = {0.6: "--", 1.5: "-.", 1.9: ":"}
# A loss this many times the first one is a divergence.
LOST = 10.0
COLUMNS = ("final loss", "largest rise", "total rise", "median lr", "highest lr")


def mlp_loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of `rj.problems.digits_mlp` on any samples."""
    *hidden, last = (params["layers"][i] for i in sorted(params["layers"]))
    for layer in hidden:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"][None])
    outputs = inputs @ last["kernel"] + last["bias"][None]
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


def train(
    optimizer: optax.GradientTransformation, batch: int, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Loss on all samples before, and learning rate of, every step."""
    start = rj.problems.digits_mlp(SAMPLES).params
    images, targets = rj.problems.digits(SAMPLES)
    inputs = images.reshape(SAMPLES, -1)
    update = optax.with_extra_args_support(optimizer).update

    def body(carry, key):
        params, state = carry
        chosen = jax.random.permutation(key, SAMPLES)[:batch]
        data = {"inputs": inputs[chosen], "targets": targets[chosen]}
        grad = jax.grad(mlp_loss)(params, **data)
        updates, state = update(grad, state, params, value_fn=mlp_loss, **data)
        seen = mlp_loss(params, inputs, targets), optax.tree.get(state, "learning_rate")
        return (optax.apply_updates(params, updates), state), seen

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(body, (start, optimizer.init(start)), keys)[1]


def fixed(lr: jax.Array) -> optax.GradientTransformation:
    """Gradient descent that holds its learning rate in the state, as DAL does."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=lr)


def grid(
    make: Callable[[Any], optax.GradientTransformation],
    values: Sequence[float],
    batch: int,
    steps: int,
) -> list[dict[str, Any]]:
    """A run for each value, all in one program."""
    run = jax.jit(jax.vmap(lambda value: train(make(value), batch, steps)))
    losses, rates = (np.asarray(x) for x in run(jnp.array(values)))
    return [describe(*row) for row in zip(values, losses, rates, strict=True)]


def describe(value: float, loss: np.ndarray, rate: np.ndarray) -> dict[str, Any]:
    """What is printed and drawn of a run; infinite where it diverged."""
    diverged = not np.isfinite(loss).all() or loss[-1] > LOST * loss[0]
    rises = np.array([np.inf]) if diverged else np.maximum(np.diff(loss), 0)
    return {
        "value": value,
        "diverged": bool(diverged),
        "final loss": math.inf if diverged else float(np.mean(loss[-20:])),
        "largest rise": float(rises.max()),
        "total rise": float(rises.sum()),
        "median lr": float(np.median(rate)),
        "highest lr": float(np.max(rate)),
        "loss": loss.tolist(),
        "lr": rate.tolist(),
    }


def draw(results: dict[str, dict[str, list[dict[str, Any]]]]) -> Figure:
    """A row for each batch size: loss, learning rate, and instability against p."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle("Digits MLP: DAL-p, lr = min(2 / (|Hg| / |g|)^p, 5), nothing tuned")
    for axes, (name, found) in zip(
        figure.subplots(len(results), 3, squeeze=False), results.items(), strict=True
    ):
        loss, rate, unstable = axes
        for run in found["DAL"]:
            style = {"color": colormaps["turbo"](run["value"]), "lw": 0.8}
            seen = np.array(run["loss"])
            # What follows a divergence is no learning rate worth a look.
            alive = np.logical_and.accumulate(seen < LOST * seen[0])
            loss.plot(
                np.where(alive, seen, np.nan), **style, label=f"p = {run['value']:g}"
            )
            rate.plot(np.where(alive, run["lr"], np.nan), **style)
        for run in found["GD"]:
            if run["value"] in DRAWN:
                style, label = DRAWN[run["value"]], f"GD, lr = {run['value']:g}"
                seen = np.array(run["loss"])
                seen[~(seen < LOST * seen[0])] = np.nan
                loss.plot(seen, color="k", ls=style, lw=1.2, label=label)
        loss.set(title=f"{name}: loss on all samples", yscale="log", ylim=(1e-3, 10))
        loss.legend(fontsize=7, ncols=2)
        rate.set(title="learning rate of DAL-p", ylim=(0.5, 2.5))
        for panel in (loss, rate):
            panel.set_xlabel("optimizer steps")

        kept = [run for run in found["DAL"] if not run["diverged"]]
        powers = [run["value"] for run in kept]
        for key, mark in (("total rise", "o-"), ("final loss", "s-")):
            unstable.plot(powers, [run[key] for run in kept], mark, label=key)
        lost = [run["value"] for run in found["DAL"] if run["diverged"]]
        if lost:
            unstable.axvspan(
                min(lost) - 0.05,
                max(lost) + 0.05,
                color="r",
                alpha=0.15,
                label="diverged",
            )
        unstable.set(title="stability against p", xlabel="p", yscale="log")
        unstable.legend(fontsize=8)
    return figure


def main() -> None:
    """Train, print, draw and write."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    results = {}
    for batch in (SAMPLES, BATCH):
        name = "full batch" if batch == SAMPLES else f"batches of {batch}"
        found = {
            "DAL": grid(dal, POWERS, batch, options.steps),
            "GD": grid(fixed, RATES, batch, options.steps),
        }
        results[name] = found
        print(head((name, *COLUMNS)))
        for kind, label in (("DAL", "DAL, p"), ("GD", "GD, lr")):
            for run in found[kind]:
                cells = [f"{run[key]:.3g}" for key in COLUMNS]
                print(row((f"{label} = {run['value']:g}", *cells)))
        print(flush=True)
    write(options.out / "dal.json", results)
    draw(results).savefig(options.out / "dal.png", dpi=110)


if __name__ == "__main__":
    main()
