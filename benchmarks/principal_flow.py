"""Gradient descent against gradient flow, IGR, third order and the principal flow.

On the banana valley and on a cosine, each at a small, a medium (oscillating) and a
diverging or escaping learning rate: prints the mean distance of each flow to the
iterates, up to where any of them leaves the picture, and draws the paths. And the
stability coefficients along gradient descent of the digits MLP at the edge.

    python benchmarks/principal_flow.py --out figures
"""

from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rodjax as rj

FLOWS = {
    "gradient flow": rj.flows.gradient,
    "IGR": rj.flows.igr,
    "third order": rj.flows.third_order,
    "principal": rj.flows.principal,
}
STYLES = {
    "gradient flow": {"color": "C0"},
    "IGR": {"color": "C2"},
    "third order": {"color": "C4"},
    "principal": {"color": "C3", "lw": 1.8},
}
#: Points of a path to an optimizer step.
DENSITY = 16
#: (learning rate, start, steps, title).
BANANA = (
    (0.05, (-1.0, 2.0), 40, "small"),
    (0.16, (-1.0, 2.0), 30, "oscillating"),
    (0.21, (1.05, 0.98), 7, "leaving the minimum"),
)
COSINE = (
    (0.5, 0.1, 14, "small"),
    (1.5, 0.5, 14, "oscillating"),
    (2.4, 3.12, 14, "leaving the minimum"),
)
MLP_RATE, COUNT = 0.6, 3


def follow(
    problem: rj.problems.Problem, cases: Sequence[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """The iterates of gradient descent and, finer, the path of every flow."""
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flat = lambda tree: np.stack([np.asarray(x) for x in jax.tree.leaves(tree)], -1)
    built = {name: build(dynamics) for name, build in FLOWS.items()}
    results = []
    for lr, start, steps, title in cases:
        values = np.atleast_1d(start).tolist()
        params = jax.tree.unflatten(
            jax.tree.structure(problem.params), [jnp.asarray(v) for v in values]
        )
        run = rj.descend(dynamics, params, steps, lr=lr)
        iterates = flat(jax.tree.map(lambda e: e[:, 0], run.ends))
        found: dict[str, Any] = {"lr": lr, "title": title, "steps": steps}
        found["gradient descent"] = iterates
        for name, flow in built.items():
            found[name] = finely(flow, params, lr, steps)
        results.append(found)
    return results


def finely(flow: rj.flows.Flow, params: Any, lr: float, steps: int) -> np.ndarray:
    """The path [1 + steps * DENSITY, coordinates]; NaN from where it diverges."""
    lr = jnp.asarray(lr)
    saved = diffrax.SaveAt(ts=jnp.linspace(0.0, steps, 1 + steps * DENSITY))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(flow.vector_field),
        diffrax.Dopri8(),
        t0=0.0,
        t1=float(steps),
        dt0=0.01,
        y0=flow.init(params, lr=lr, key=jax.random.key(0)),
        args=lr,
        saveat=saved,
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
        event=diffrax.Event(lambda t, y, args, **_: ~(optax.tree.norm(y) < 1e8)),
        max_steps=20_000,
        throw=False,
    )
    leaves = jax.tree.leaves(jax.vmap(flow.centre)(solution.ys).params)
    points = np.stack([np.asarray(x) for x in leaves], -1)
    return np.where(np.isfinite(points), points, np.nan)


def distances(found: dict[str, Any], limit: float = 10.0) -> dict[str, float]:
    """Mean distances to the iterates, over the steps before any passes `limit`."""
    paths = {name: found[name][::DENSITY] for name in FLOWS}
    everything = np.hstack([found["gradient descent"], *paths.values()])
    inside = np.all(np.abs(np.nan_to_num(everything, nan=np.inf)) < limit, 1)
    last = len(inside) if inside.all() else int(np.argmin(inside))
    apart = {name: path - found["gradient descent"] for name, path in paths.items()}
    mean = {n: float(np.linalg.norm(x[:last], axis=1).mean()) for n, x in apart.items()}
    return mean | {"steps compared": last - 1}


def train(steps: int) -> dict[str, Any]:
    """Stability coefficients along gradient descent of the digits MLP."""
    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd(MLP_RATE), problem.loss)
    metrics = [
        rj.stability_coefficients(dynamics, COUNT, tol=1e-3),
        rj.edge_of_stability(dynamics, tol=1e-3),
    ]
    nothing = lambda params: None
    run = rj.descend(dynamics, problem.params, steps, metrics=metrics, keep=nothing)
    found = {name: np.asarray(values) for name, values in run.metrics.items()}
    return {"steps": np.asarray(run.steps), **found}


def draw_paths(axes: Axes, found: dict[str, Any], problem: str) -> None:
    """Every flow as a curve, dots at its whole steps, and the iterates."""

    def points(path):
        steps = np.linspace(0, found["steps"], len(path))
        return path.T if problem == "banana" else (steps, path[:, 0])

    for name in FLOWS:
        axes.plot(*points(found[name]), label=name, **STYLES[name])
        if name == "principal":
            axes.plot(*points(found[name][::DENSITY]), "o", color="C3", ms=6)
    style = {"color": "k", "lw": 0.8, "ls": "--", "marker": "o", "ms": 4, "mfc": "w"}
    iterates = found["gradient descent"]
    axes.plot(*points(iterates), label="gradient descent", zorder=3, **style)
    axes.set_title(f"{problem}, lr = {found['lr']:g}: {found['title']}")


def draw_banana(axes: Axes, found: dict[str, Any]) -> None:
    """Paths in the plane over the contours of the loss."""
    # The minimum at (1, 1) is in every picture.
    shown = np.vstack([found["gradient descent"], np.ones((1, 2))])
    margin = 0.12 * np.ptp(shown, axis=0)
    left, bottom = shown.min(0) - margin
    right, top = shown.max(0) + margin
    x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
    loss = np.asarray(rj.problems.banana().loss({"x": x, "y": y}))
    levels = np.geomspace(1e-3, 1.0, 14) * loss.max()
    axes.contour(x, y, loss, levels, colors="0.82", linewidths=0.8, zorder=0)
    axes.plot(1.0, 1.0, "*", color="0.3", ms=12, zorder=1)
    draw_paths(axes, found, "banana")
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")


def draw_cosine(axes: Axes, found: dict[str, Any]) -> None:
    """The parameter against optimizer steps."""
    axes.axhline(np.pi, color="0.8", lw=1, zorder=0)
    draw_paths(axes, found, "cosine")
    low, high = found["gradient descent"].min(), found["gradient descent"].max()
    margin = 0.15 * (high - low)
    axes.set(xlabel="optimizer steps", ylabel="w", ylim=(low - margin, high + margin))


def draw(
    banana: list[dict[str, Any]], cosine: list[dict[str, Any]], mlp: dict[str, Any]
) -> Figure:
    """Valley, cosine, and the network at the edge, a row each."""
    figure = Figure(figsize=(15, 14), layout="constrained")
    grid = figure.add_gridspec(3, 6, height_ratios=(1.25, 0.9, 0.9))
    for i, (valley, wave) in enumerate(zip(banana, cosine, strict=True)):
        draw_banana(figure.add_subplot(grid[0, 2 * i : 2 * i + 2]), valley)
        draw_cosine(figure.add_subplot(grid[1, 2 * i : 2 * i + 2]), wave)
    figure.axes[0].legend(loc="lower left")

    left, right = (figure.add_subplot(grid[2, s]) for s in (slice(0, 3), slice(3, 6)))
    for i in reversed(range(COUNT)):
        values = mlp[f"stability_coefficient_{i + 1}"]
        left.plot(
            mlp["steps"], values, color=f"C{i}", lw=1, label=f"eigenvector {i + 1}"
        )
    left.axhline(0.0, color="0.4", ls=":", lw=1)
    left.set_yscale("symlog", linthresh=1e-7)
    left.set_title(f"digits MLP, lr = {MLP_RATE:g}: stability coefficients of GD")
    left.legend(loc="lower right", fontsize=9)
    right.plot(mlp["steps"], 2 * mlp["sharpness_ratio"], lw=1)
    right.axhline(2.0, color="0.4", ls=":", lw=1)
    right.set_title("sharpness × lr (shaded: above the edge of stability)")
    for axes in (left, right):
        axes.set_xlabel("optimizer steps")
        above = mlp["sharpness_ratio"] > 1
        whole = axes.get_xaxis_transform()
        axes.fill_between(
            mlp["steps"], 0, 1, above, transform=whole, color="C3", alpha=0.1, lw=0
        )
    return figure


def main() -> None:
    """Run, print, draw and write."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of the digits MLP")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    results = {
        "banana": follow(rj.problems.banana(), BANANA),
        "cosine": follow(rj.problems.cosine(), COSINE),
    }
    columns = (*FLOWS, "steps compared")
    print(head(("problem", "lr", *columns)))
    for name, cases in results.items():
        for found in cases:
            found["distances"] = distances(found)
            cells = [f"{found['distances'][key]:.3g}" for key in columns]
            print(row((name, f"{found['lr']:g}", *cells)))
    mlp = train(options.steps)
    first, ratio = mlp["stability_coefficient_1"], mlp["sharpness_ratio"]
    agree = np.mean((first > 0) == (ratio > 1))
    print(
        f"digits MLP: coefficient 1 positive at {np.mean(first > 0):.0%} of the steps,"
    )
    print(f"as the sharpness ratio is above 1 at {agree:.1%} of them")

    write(options.out / "principal_flow.json", results | {"digits": mlp})
    draw(**results, mlp=mlp).savefig(options.out / "principal_flow.png", dpi=110)


if __name__ == "__main__":
    main()
