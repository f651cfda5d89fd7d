"""Edge gradient descent against gradient descent at the same learning rates.

Trains the digits MLP, full batch, from its initial parameters; prints the final loss,
how much the loss climbs in all, and the sharpness over its threshold 2 / lr (the
highest, and the mean of the last fifty steps), and draws them along the way.

    python benchmarks/edge_gradient_descent.py --out figures
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, write
from matplotlib.figure import Figure

import rodjax as rj
from rodjax.transforms import edge_gradient_descent

RATES = (0.4, 0.6, 0.8, 1.0)
#: The optimizers by name: functions of the learning rate.
OPTIMIZERS = {
    "GD": lambda lr: optax.with_extra_args_support(optax.sgd(lr)),
    "EGD": edge_gradient_descent,
    "EGD, floor 1e-3": lambda lr: edge_gradient_descent(lr, floor=1e-3),
    "EGD, floor 1e-2": lambda lr: edge_gradient_descent(lr, floor=1e-2),
}
COLUMNS = ("final loss", "largest rise", "total rise", "highest ratio", "final ratio")


def train(name: str, steps: int) -> list[dict[str, Any]]:
    """A run for each learning rate, all in one program."""
    problem = rj.problems.digits_mlp()

    def run(lr):
        optimizer = OPTIMIZERS[name](lr)

        def body(carry, _):
            params, state, vector = carry
            value, grad = jax.value_and_grad(problem.loss)(params)
            pair = rj.sharpness(problem.loss, params, guess=vector, tol=1e-4)
            updates, state = optimizer.update(
                grad, state, params, value_fn=problem.loss
            )
            radius = optax.tree.get(state, "radius", jnp.zeros(()))
            new = optax.apply_updates(params, updates), state, pair.vector
            return new, (value, lr * pair.value / 2, radius)

        guess = optax.tree.random_like(jax.random.key(0), problem.params)
        start = problem.params, optimizer.init(problem.params), guess
        return jax.lax.scan(body, start, length=steps)[1]

    found = (np.asarray(x) for x in jax.jit(jax.vmap(run))(jnp.array(RATES)))
    return [describe(name, *row) for row in zip(RATES, *found, strict=True)]


def describe(
    name: str, lr: float, loss: np.ndarray, ratio: np.ndarray, radius: np.ndarray
) -> dict[str, Any]:
    """What is printed and drawn of a run."""
    rises = np.maximum(np.diff(loss), 0)
    return {
        "optimizer": name,
        "lr": lr,
        "final loss": float(loss[-1]),
        "largest rise": float(rises.max()),
        "total rise": float(rises.sum()),
        # The first steps leave the initial parameters, of whatever sharpness.
        "highest ratio": float(ratio[10:].max()),
        "final ratio": float(ratio[-50:].mean()),
        "loss": loss.tolist(),
        "ratio": ratio.tolist(),
        "radius": radius.tolist(),
    }


def draw(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """A column for each learning rate: loss, sharpness over threshold, radius."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    figure.suptitle("Digits MLP: gradient descent (GD) and edge gradient descent (EGD)")
    grid = figure.subplots(3, len(RATES), sharex=True, sharey="row")
    for name, runs in results.items():
        plain = name == "GD"
        # On top, and broken, to be seen where EGD coincides with it.
        style = {"color": "k", "lw": 0.8, "ls": "--", "zorder": 3} if plain else {}
        for (loss, ratio, radius), run in zip(grid.T, runs, strict=True):
            loss.plot(run["loss"], label=name, **style)
            ratio.plot(run["ratio"], **style)
            if not plain:
                radius.plot(run["radius"], **style)
    for column, lr in zip(grid.T, RATES, strict=True):
        column[0].set_title(f"lr = {lr:g}")
        column[1].axhline(1.0, color="gray", ls=":", lw=1)
        column[2].set_xlabel("optimizer steps")
    for axes, label in zip(
        grid[:, 0], ("loss", "sharpness × lr / 2", "radius r"), strict=True
    ):
        axes.set_ylabel(label)
    grid[0, 0].set_yscale("log")
    grid[1, 0].set_ylim(0.5, 1.5)
    grid[2, 0].set_yscale("log")
    grid[0, 0].legend(fontsize=8)
    return figure


def main() -> None:
    """Train, print, draw and write."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    results = {name: train(name, options.steps) for name in OPTIMIZERS}
    print(head(("lr", "optimizer", *COLUMNS)))
    for runs in zip(*results.values(), strict=True):
        for run in runs:
            cells = [f"{run[key]:.3g}" for key in COLUMNS]
            print(row((f"{run['lr']:g}", run["optimizer"], *cells)))
    write(options.out / "edge_gradient_descent.json", results)
    draw(results).savefig(options.out / "edge_gradient_descent.png", dpi=110)


if __name__ == "__main__":
    main()
