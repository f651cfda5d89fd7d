"""Seven models of gradient descent on Berthier's examples of the edge of stability.

On the example of two parameters, from its own start and from one near the edge, on the
one whose edge is a circle and on the one with two eigenvalues at the edge, gradient
descent and six flows go on from the same six optimizer steps. Prints a table for each,
in which S is the largest second derivative along x at x = 0, and draws S, the
amplitude, the path along the circle, and the second eigenvalue.

    python benchmarks/berthier.py --out figures
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _common import arguments, head, row, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rodjax as rj
from rodjax.problems import berthier, berthier_circle, berthier_matrix

ETA, EPS, WARM, LATE = 0.3, 0.01, 6, 300
EDGE = 2 / ETA
#: Half of sqrt(2 eps), the amplitude of the cycle at the edge.
ONSET = (2 * EPS) ** 0.5 / 2
RUN = "gradient descent"
#: Colors that the colour-blind can tell apart (Okabe, Ito), and dashes.
STYLES = {
    RUN: {"color": "0.72", "lw": 5.0, "solid_capstyle": "round"},
    "modulated": {"color": "#D55E00", "lw": 1.6},
    "bundle of rods": {"color": "#009E73", "lw": 2.2, "ls": (0, (5, 2))},
    "single rod": {"color": "#56B4E9", "lw": 1.6, "ls": (0, (1.5, 1.5)), "zorder": 4},
    "edge": {"color": "#0072B2", "lw": 1.1},
    "covariance": {"color": "#CC79A7", "lw": 1.1, "ls": (0, (4, 1.5))},
    "central": {"color": "k", "lw": 1.3, "ls": (0, (6, 1.5, 1, 1.5))},
}
COLUMNS = ("final S", "mean S", "highest S", "amplitude", "onset")
DISTANCES = ("mean distance", "final distance")


def second_derivatives(params: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the least eigenvalue of H(y), along a path."""
    first, second, off = np.moveaxis(np.asarray(params["y"]), -1, 0)
    mean = (first + second) / 2
    apart = np.sqrt((first - second) ** 2 / 4 + off**2 / 2)
    return mean + apart, mean - apart


class Case(NamedTuple):
    """An example: how many of its eigenvalues come to the edge, steps, S of a path."""

    title: str
    problem: rj.problems.Problem
    edges: int
    steps: int
    sharpness: Callable[[dict[str, Any]], np.ndarray]


Paths = dict[str, rj.Trajectory]


def cases() -> list[Case]:
    """The four examples."""
    height = lambda params: np.asarray(params["y"])
    radius = lambda params: np.linalg.norm(params["y"], axis=-1) + 3
    largest = lambda params: second_derivatives(params)[0]
    near = berthier(eps=EPS, initial=(0.1, 6.2))
    return [
        Case("from (0, 5)", berthier(eps=EPS), 1, 1800, height),
        Case("from (0.1, 6.2)", near, 1, 900, height),
        Case("circle", berthier_circle(eps=EPS), 1, 3000, radius),
        Case("matrix", berthier_matrix(eps=EPS), 2, 2400, largest),
    ]


def solve(case: Case) -> Paths:
    """The trajectories by name."""
    sgd = rj.dynamics(optax.sgd(ETA), case.problem.loss)
    flows = {
        "modulated": rj.flows.modulated(sgd),
        "bundle of rods": rj.flows.rod(sgd, rank=case.edges + 1),
        "single rod": rj.flows.rod(sgd),
        "edge": rj.flows.edge(sgd),
        "covariance": rj.flows.covariance(sgd, rank=case.edges + 1),
        "central": rj.flows.central(sgd, rank=case.edges),
    }
    begin = rj.warm_up(sgd, case.problem.params, WARM)
    paths = {RUN: rj.descend(sgd, begin, case.steps)}
    return paths | {
        name: rj.integrate(flow, begin, case.steps) for name, flow in flows.items()
    }


def describe(case: Case, path: rj.Trajectory, run: rj.Trajectory) -> dict[str, float]:
    """The figures of one trajectory."""
    sharpness = case.sharpness(path.params)
    size = np.asarray(path.metrics["amplitude"])
    apart = rj.compare(run, path).summary()
    # The first time that the amplitude rises through half of the cycle's.
    rises = np.flatnonzero((size[:-1] < ONSET) & (size[1:] >= ONSET))
    figures = (
        sharpness[-1],
        sharpness[-LATE:].mean(),
        np.nanmax(sharpness),
        size[-1],
        path.steps[1 + rises[0]] if rises.size else np.nan,
        apart["mean_distance"],
        apart["final_distance"],
    )
    return dict(zip(COLUMNS + DISTANCES, map(float, figures), strict=True))


def height_limits(axes: Axes, case: Case, paths: Paths) -> None:
    """What never sees the edge leaves the panel."""
    seen = np.concatenate([case.sharpness(paths[n].params) for n in (RUN, "central")])
    low, top = seen.min(), seen.max()
    axes.set_ylim(low - 0.05 * (top - low), top + 0.25 * (top - low))


def draw(solved: list[tuple[Case, Paths]]) -> Figure:
    """A column for each example: S, and below what else is to be seen of it."""
    figure = Figure(figsize=(19, 8.5), layout="constrained")
    figure.suptitle(
        "Berthier's examples at  $\\eta = 0.3,\\ \\varepsilon = 0.01$:  "
        "gradient descent and six flows",
        fontsize=14,
    )
    grid = figure.subplots(2, len(solved))
    for (above, below), (case, paths) in zip(grid.T, solved, strict=True):
        for name, path in paths.items():
            style = STYLES[name]
            above.plot(path.steps, case.sharpness(path.params), label=name, **style)
            if case.title == "circle":
                below.plot(*np.asarray(path.params["y"]).T, **style)
            elif case.title == "matrix":
                below.plot(path.steps, second_derivatives(path.params)[1], **style)
            else:
                below.plot(path.steps, path.metrics["amplitude"], **style)
        above.axhline(EDGE, color="0.5", lw=0.8, ls=":", zorder=0)
        height_limits(above, case, paths)
        below.set_xlabel("optimizer steps")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.01)
    dotted = {"color": "0.5", "lw": 0.8, "ls": ":", "zorder": 0}
    for axes in grid[1, :2]:
        axes.axhline(2 * ONSET, **dotted)
        axes.set(yscale="log", ylim=(1e-18, 40), ylabel="amplitude of the oscillation")
    angle = np.linspace(0, np.pi / 2, 200)
    circle = (EDGE - 3) * np.stack([np.cos(angle), np.sin(angle)])
    grid[1, 2].plot(*circle, **dotted)
    grid[1, 2].set(xlabel="$y_1$", ylabel="$y_2$", xlim=(0, 4.8), ylim=(0, 2.2))
    grid[1, 3].axhline(EDGE, **dotted)
    grid[1, 3].set(ylabel="its smaller eigenvalue", ylim=(4.9, 7.2))
    grid[0, 0].set(title="$(y + x) x^2/2$, from (0, 5)", ylabel="sharpness y")
    grid[0, 1].set(title="from (0.1, 6.2)", ylabel="sharpness y")
    grid[0, 2].set(title="$(|y| + 3 e^{x/2}) x^2/2$", ylabel="sharpness |y| + 3")
    grid[0, 3].set(
        title="$x^T H(y) x/2 + (x_1^3 + x_2^3)/2$", ylabel="larger eigenvalue of H(y)"
    )
    note = {"fontsize": 10, "color": "0.35", "va": "bottom"}
    grid[0, 0].text(0, EDGE + 0.03, "$2/\\eta$", **note)
    grid[1, 0].text(0, 3 * ONSET, "$\\sqrt{2\\varepsilon}$", **note)
    # The run's are too fast for a line.
    grid[1, 0].text(90, 2e-18, "rounding errors", fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(STYLES), frameon=False
    )
    return figure


def main() -> None:
    """Solve, print, draw and write."""
    options = arguments(__doc__).parse_args()
    jax.config.update("jax_enable_x64", True)

    solved, results = [(case, solve(case)) for case in cases()], {}
    print(f"2 / eta = {EDGE:.5f}; means over the last {LATE} steps")
    for case, paths in solved:
        found = {name: describe(case, path, paths[RUN]) for name, path in paths.items()}
        results[case.title] = found
        print(f"\n{case.problem.name}, {case.title}, {case.steps} steps")
        print(head(("model", *COLUMNS, *DISTANCES)))
        for name, figures in found.items():
            print(row((name, *(f"{value:.5g}" for value in figures.values()))))
    write(options.out / "berthier.json", results, indent=2)
    draw(solved).savefig(options.out / "berthier.png", dpi=110)


if __name__ == "__main__":
    main()
