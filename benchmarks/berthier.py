"""Seven models of gradient descent on the minimal example of the edge of stability.

On Berthier's valley, from three starts at and below the edge, gradient descent and six
flows go on from the same six optimizer steps. The valley has no rounding to grow an
oscillation from (x = 0 is invariant), so the flows that have a floor are given none.
Prints a table for each start, with y the sharpness, and draws y and the amplitude.

    python benchmarks/berthier.py --out figures
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import arguments, head, row, write
from matplotlib.figure import Figure

import rodjax as rj

ETA, EPS, ZETA = 0.3, 0.01, 1.0
STARTS = ((0.1, 6.5), (0.1, 6.2), (0.01, 5.0))
WARM = 6
#: The cycle x = ±SWING at height LEVEL, which gradient descent keeps.
SWING, LEVEL = (2 * EPS) ** 0.5, 2 / ETA + 2 * EPS * ZETA
LATE = 300
RUN = "gradient descent"
#: Colors that the colour-blind can tell apart (Okabe, Ito), and dashes.
STYLES = {
    RUN: {"color": "0.72", "lw": 5.0, "solid_capstyle": "round"},
    "modulated": {"color": "#D55E00", "lw": 1.6},
    "bundle of 2 rods": {"color": "#009E73", "lw": 2.2, "ls": (0, (5, 2))},
    "single rod": {"color": "#56B4E9", "lw": 1.6, "ls": (0, (1.5, 1.5)), "zorder": 4},
    "edge": {"color": "#0072B2", "lw": 1.1},
    "covariance": {"color": "#CC79A7", "lw": 1.1, "ls": (0, (4, 1.5))},
    "central": {"color": "k", "lw": 1.3, "ls": (0, (6, 1.5, 1, 1.5))},
}
COLUMNS = ("final y", "mean y", "highest y", "amplitude", "onset")
DISTANCES = ("mean distance", "final distance")

Paths = dict[str, rj.Trajectory]


def solve(steps: int) -> list[Paths]:
    """The trajectories by name, for each start."""
    valley = rj.problems.berthier(eps=EPS, zeta=ZETA)
    sgd = rj.dynamics(optax.sgd(ETA), valley.loss)
    flows = {
        "modulated": rj.flows.modulated(sgd, floor=0.0),
        "bundle of 2 rods": rj.flows.rod(sgd, rank=2),
        "single rod": rj.flows.rod(sgd),
        "edge": rj.flows.edge(sgd, floor=0.0),
        "covariance": rj.flows.covariance(sgd, rank=2, floor=0.0),
        "central": rj.flows.central(sgd),
    }
    solved = []
    for x, y in STARTS:
        begin = rj.warm_up(sgd, {"x": jnp.asarray(x), "y": jnp.asarray(y)}, WARM)
        paths = {RUN: rj.descend(sgd, begin, steps)}
        paths |= {
            name: rj.integrate(flow, begin, steps) for name, flow in flows.items()
        }
        solved.append(paths)
    return solved


def describe(path: rj.Trajectory, run: rj.Trajectory) -> dict[str, float]:
    """The figures of one trajectory."""
    y, size = np.asarray(path.params["y"]), np.asarray(path.metrics["amplitude"])
    apart = rj.compare(run, path).summary()
    # The first time that the amplitude rises through half of the cycle's.
    rises = np.flatnonzero((size[:-1] < SWING / 2) & (size[1:] >= SWING / 2))
    figures = (
        y[-1],
        y[-LATE:].mean(),
        y.max(),
        size[-1],
        path.steps[1 + rises[0]] if rises.size else np.nan,
        apart["mean_distance"],
        apart["final_distance"],
    )
    return dict(zip(COLUMNS + DISTANCES, map(float, figures), strict=True))


def draw(solved: Sequence[Paths]) -> Figure:
    """A column for each start: the sharpness y and the amplitude against steps."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(
        "Berthier's valley  $y x^2/2 - x^4/4 - y/100$  at  $\\eta = 0.3$:  "
        "gradient descent and six flows",
        fontsize=14,
    )
    grid = figure.subplots(2, len(STARTS), sharex=True)
    for (height, amplitude), start, paths in zip(grid.T, STARTS, solved, strict=True):
        for name, path in paths.items():
            height.plot(path.steps, path.params["y"], label=name, **STYLES[name])
            amplitude.plot(path.steps, path.metrics["amplitude"], **STYLES[name])
        height.axhline(2 / ETA, color="0.5", lw=0.8, ls=":", zorder=0)
        amplitude.axhline(SWING, color="0.5", lw=0.8, ls=":", zorder=0)
        height.set_title(f"from x = {start[0]:g}, y = {start[1]:g}")
        amplitude.set_xlabel("optimizer steps")
        # What never sees the edge leaves the panel.
        top = max(np.max(paths[name].params["y"]) for name in (RUN, "edge"))
        low = min(np.min(path.params["y"]) for path in paths.values())
        height.set_ylim(low - 0.1 * (top - low), top + 0.25 * (top - low))
        amplitude.set_yscale("log")
        amplitude.set_ylim(1e-6, 4)
        for axes in (height, amplitude):
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.01)
    grid[0, 0].set_ylabel("sharpness y")
    grid[1, 0].set_ylabel("amplitude of the oscillation")
    # Where no line is.
    note = {"fontsize": 10, "color": "0.35", "va": "bottom"}
    grid[0, 2].text(0, 2 / ETA + 0.04, "$2/\\eta$", **note)
    grid[1, 2].text(60, SWING * 1.2, "$\\sqrt{2\\varepsilon}$", **note)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(STYLES), frameon=False
    )
    return figure


def main() -> None:
    """Solve, print, draw and write."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    solved, results = solve(options.steps), {}
    print(f"2 / eta = {2 / ETA:.5f}; the cycle: y = {LEVEL:.5f}, x = ±{SWING:.5f}")
    for start, paths in zip(STARTS, solved, strict=True):
        found = {name: describe(path, paths[RUN]) for name, path in paths.items()}
        results[f"{start[0]:g}, {start[1]:g}"] = found
        print(f"\nfrom x = {start[0]:g}, y = {start[1]:g}; means over the last {LATE}")
        print(head(("model", *COLUMNS, *DISTANCES)))
        for name, figures in found.items():
            print(row((name, *(f"{value:.5g}" for value in figures.values()))))
    write(options.out / "berthier.json", results, indent=2)
    draw(solved).savefig(options.out / "berthier.png", dpi=110)


if __name__ == "__main__":
    main()
