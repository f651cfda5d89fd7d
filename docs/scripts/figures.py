"""Draws the figures of the documentation, all of them in a few minutes.

    python docs/scripts/figures.py

Small problems with a few parameters: Berthier's valley, whose sharpness is its
parameter y (up to x^2); quadratics and a curved valley for flows of small steps; and
the reference problem, the digits MLP, for the limit of predictability.
"""

from functools import partial
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

import rodjax as rj

OUT = Path(__file__).parents[1] / "figures"
LR = 0.3
STEPS = 1000
BANANA_LR, BANANA_STEPS = 0.1, 40
DIGITS_LR, DIGITS_STEPS = 0.6, 640
RUN, NAIVE, FLOW = "0.6", "tab:blue", "tab:red"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "font.size": 9,
    "svg.hashsalt": "rodjax",
    "figure.constrained_layout.use": True,
}


def save(figure, name: str) -> None:
    """As SVG that is the same every time."""
    figure.savefig(OUT / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def valley():
    """Gradient descent on Berthier's valley, and where the comparison starts."""
    problem = rj.problems.berthier(initial=(0.1, 6.0))
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    start = rj.warm_up(dynamics, problem.params, 20, lr=LR)
    return dynamics, start, rj.descend(dynamics, start, STEPS, lr=LR)


def panels():
    """Axes for the sharpness and for the size of the oscillation."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6))
    axes[0].axhline(2 / LR, color="black", lw=0.8, ls=":", label="threshold 2/lr")
    axes[0].set(xlabel="optimizer steps", ylabel="y, the sharpness")
    axes[1].set(xlabel="optimizer steps", ylabel="amplitude of x", yscale="log")
    axes[1].set_ylim(1e-5, 1)
    return figure, axes


def course(axes, path, label: str, colour: str, **style) -> None:
    """A trajectory on both axes."""
    axes[0].plot(path.steps, path.params["y"], color=colour, label=label, **style)
    axes[1].plot(path.steps, path.metrics["amplitude"], color=colour, **style)


def at_the_edge() -> None:
    """Run, stable flow and one flow on the valley: five figures and the overview."""
    dynamics, start, run = valley()
    solve = partial(rj.integrate, start=start, steps=STEPS, lr=LR)
    stable = solve(rj.flows.stable(dynamics))
    flows = {
        "rod": (rj.flows.rod(dynamics), "rod"),
        "modulated": (rj.flows.modulated(dynamics), "modulated"),
        "edge": (rj.flows.edge(dynamics), "edge"),
        "central": (rj.flows.central(dynamics, rank=1), "central, rank 1"),
        "covariance": (rj.flows.covariance(dynamics, rank=1), "covariance, rank 1"),
    }
    for name, (flow, label) in flows.items():
        figure, axes = panels()
        course(axes, run, "gradient descent", RUN, lw=3)
        course(axes, stable, "stable", NAIVE, lw=1, ls="--")
        course(axes, solve(flow), label, FLOW, lw=1)
        if name == "rod":
            bundle = rj.flows.rod(dynamics, rank=2)
            course(axes, solve(bundle), "bundle of 2", "tab:green", lw=2, ls=":")
        axes[0].set_ylim(5.8, 8.2)
        axes[0].legend(fontsize=7)
        save(figure, name)
    figure, axes = panels()
    course(axes, run, "gradient descent", RUN, lw=3)
    course(axes, stable, "stable", FLOW, lw=1)
    axes[0].set_ylim(5.8, 16)
    axes[0].legend(fontsize=7)
    save(figure, "stable")

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6))
    axes[0].axhline(2 / LR, color="black", lw=0.8, ls=":", label="threshold 2/lr")
    axes[0].plot(run.steps, run.params["y"], color=RUN, lw=2)
    axes[0].set(xlabel="optimizer steps", ylabel="y, the sharpness")
    axes[0].legend(fontsize=7)
    axes[1].plot(run.steps, run.ends["x"][:, 0], color=RUN, lw=0.4)
    axes[1].plot(run.steps, run.params["x"], color=FLOW, lw=1, label="midpoints")
    axes[1].set(xlabel="optimizer steps", ylabel="x, the iterates")
    axes[1].legend(fontsize=7)
    save(figure, "edge-of-stability")


def small_steps() -> None:
    """The flows of small steps on a quadratic of one parameter: the error a step."""
    sharpness = 1.0
    loss = lambda w: 0.5 * sharpness * w**2
    dynamics = rj.dynamics(optax.sgd, loss)
    builds = {
        "gradient": rj.flows.gradient,
        "igr": rj.flows.igr,
        "third_order": rj.flows.third_order,
    }
    lrs = np.geomspace(0.02, 1.0, 12)

    def error(build):
        one = lambda lr: rj.integrate(
            build(dynamics), jnp.array(1.0), 1, lr=lr, solver=diffrax.Dopri8()
        ).params[-1]
        return np.abs(np.asarray(jax.vmap(one)(jnp.asarray(lrs))) - (1 - lrs))

    errors = {name: error(build) for name, build in builds.items()}
    problem = rj.problems.banana()
    steep = rj.dynamics(optax.sgd, problem.loss)
    lr = BANANA_LR
    run = rj.descend(steep, problem.params, BANANA_STEPS, lr=lr)
    for name, build in builds.items():
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6))
        for other, line in errors.items():
            mine = other == name
            axes[0].loglog(
                lrs,
                line,
                color=FLOW if mine else RUN,
                lw=1.6 if mine else 1,
                label=other.replace("_", " "),
            )
        axes[0].set(xlabel="learning rate x curvature", ylabel="error of one step")
        axes[0].legend(fontsize=7)
        path = rj.integrate(build(steep), problem.params, BANANA_STEPS, lr=lr)
        for shown, style in (
            (run.ends, {"color": RUN, "marker": ".", "lw": 0.6}),
            (path.params, {"color": FLOW, "lw": 1.2}),
        ):
            # Of the two ends of a jump the first is the iterate.
            x, y = (
                np.asarray(shown[key]).reshape(BANANA_STEPS + 1, -1) for key in "xy"
            )
            axes[1].plot(x[:, 0], y[:, 0], **style)
        axes[1].set(xlabel="x", ylabel="y, in a curved valley")
        axes[1].legend(["gradient descent", name.replace("_", " ")], fontsize=7)
        save(figure, name)


def principal() -> None:
    """The principal flow on quadratics below, at and beyond the threshold."""
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.4))
    loss = lambda w: 0.5 * jnp.sum(w**2)
    dynamics = rj.dynamics(optax.sgd, loss)
    for ax, lr in zip(axes, (0.6, 1.6, 2.1), strict=True):
        steps = 12
        run = rj.descend(dynamics, jnp.ones(1), steps, lr=lr)
        solve = partial(rj.integrate, start=jnp.ones(1), lr=lr, solver=diffrax.Dopri8())
        flow = rj.flows.principal(dynamics)
        path = solve(flow, steps=steps)
        other = solve(rj.flows.gradient(dynamics), steps=steps)
        ax.plot(run.steps, run.ends[:, 0, 0], "o", color=RUN, label="gradient descent")
        ax.plot(other.steps, other.params[:, 0], color=NAIVE, ls="--", label="gradient")
        ax.plot(
            path.steps, path.params[:, 0], ".-", color=FLOW, lw=0.8, label="principal"
        )
        ax.set(title=f"lr x curvature = {lr}", xlabel="optimizer steps")
    axes[0].set_ylabel("w")
    axes[0].legend(fontsize=7)
    save(figure, "principal")


def predictability() -> None:
    """Distances of two flows and of the run from itself, in both precisions."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
    for ax, dtype in zip(axes, ("float32", "float64"), strict=True):
        problem = rj.problems.digits_mlp(dtype=dtype)
        dynamics = rj.dynamics(optax.sgd, problem.loss)
        start = rj.warm_up(dynamics, problem.params, 20, lr=DIGITS_LR)
        options = {"steps": DIGITS_STEPS, "lr": DIGITS_LR, "every": 2}
        run = rj.descend(dynamics, start, **options)
        for build, colour in ((rj.flows.stable, NAIVE), (rj.flows.modulated, FLOW)):
            path = rj.integrate(build(dynamics), start, **options)
            distance = rj.compare(run, path).distance
            ax.semilogy(run.steps, distance, color=colour, lw=1, label=build.__name__)
        limit = rj.predictability(dynamics, start, **options)
        ax.semilogy(run.steps, limit.distance, color="black", lw=1, label="limit")
        ax.set(title=dtype, xlabel="optimizer steps")
    axes[0].set(ylabel="distance from the run", ylim=(1e-8, 2))
    axes[0].legend(fontsize=7)
    save(figure, "predictability")


def main() -> None:
    """Draws all."""
    jax.config.update("jax_enable_x64", True)
    matplotlib.use("agg")
    matplotlib.rcParams.update(STYLE)
    OUT.mkdir(exist_ok=True)
    at_the_edge()
    small_steps()
    principal()
    predictability()


if __name__ == "__main__":
    main()
