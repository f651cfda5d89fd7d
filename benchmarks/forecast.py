"""How well a forecast from a checkpoint calls what learning rates will do.

Digits, full batch, an MLP and a CNN, each trained for a while with gradient descent,
heavy ball and Adam in a plain loop of Optax. From the checkpoint there the flows
predict the next steps at 16 learning rates, from a quarter to eight times the old one,
and the optimizer itself is run at each of them. The table has, for each flow, over the
rates at which the run does not diverge, the rank correlation (Spearman) of predicted
and true loss at the end and the median relative error; how many of the rates at which
the run is lost the flow calls lost too, and how many others it does; and what the
forecast costs, compiled, beside the runs. A rate is lost where the run diverges or its
loss ends above that at the start.

    python benchmarks/forecast.py
    python benchmarks/forecast.py --rows mlp-adam --steps 400

It writes a picture for each row, and `forecast.json`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _common import arguments, head, row, seconds, words, write
from scipy.stats import spearmanr

import rodjax as rj
from rodjax import problems

OPTIMIZERS: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "heavy-ball": partial(optax.sgd, momentum=0.9),
    "adam": partial(optax.adam, b2=0.99),
}
NETWORKS = {"mlp": (problems.mlp, 100), "cnn": (problems.cnn, 50)}
FLOWS = ("stable", "modulated")


class Row(NamedTuple):
    """The learning rate of the run, and the steps that it takes to its checkpoint."""

    lr: float
    trained: int


ROWS: Mapping[str, Row] = {
    "mlp-gd": Row(0.3, 200),
    "mlp-heavy-ball": Row(0.3, 100),
    "mlp-adam": Row(0.01, 100),
    "cnn-gd": Row(0.15, 100),
    "cnn-heavy-ball": Row(0.05, 100),
    "cnn-adam": Row(0.01, 100),
}


def trained(factory: Any, loss: Any, params: Any, chosen: Row) -> tuple[Any, Any]:
    """Parameters and optimizer state after a plain loop."""
    optimizer = factory(chosen.lr)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for _ in range(chosen.trained):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def lost(data: Any) -> np.ndarray:
    """[flow, lr]: diverged, or ended above where it began."""
    end, begun = data.end_loss.values, data.mean_loss.isel(step=0).values
    return data.diverged_at.notnull().values | ~(end <= begun)


def judged(data: Any) -> dict[str, dict[str, float]]:
    """Flow -> how close its losses are to the run's, and which rates it calls lost."""
    gone = dict(zip(data.flow.values.tolist(), lost(data), strict=True))
    end = {name: data.end_loss.sel(flow=name).values for name in gone}
    fine, found = ~gone["run"], {}
    for name in FLOWS:
        both = np.isfinite(end["run"]) & np.isfinite(end[name])
        ranks = spearmanr(end["run"][both], end[name][both]).statistic
        some = fine & both
        ranks_fine = spearmanr(end["run"][some], end[name][some]).statistic
        error = np.abs(end[name] / end["run"] - 1)[some]
        found[name] = {
            "rank_correlation": float(ranks),
            "rank_correlation_not_lost": float(ranks_fine),
            "median_relative_error": float(np.median(error)),
            "worst_relative_error": float(np.max(error)),
            "lost": int(gone["run"].sum()),
            "called": int((gone["run"] & gone[name]).sum()),
            "false_alarms": int((fine & gone[name]).sum()),
            "diverged": int(data.diverged_at.sel(flow="run").notnull().sum()),
            "diverged_called": int(
                data.diverged_at.sel(flow=["run", name]).notnull().all("flow").sum()
            ),
            "largest_lr": float(data.largest_lr.sel(flow=name)),
            "largest_lr_run": float(data.largest_lr.sel(flow="run")),
        }
    return found


def measured(name: str, steps: int, lanes: int) -> tuple[dict[str, Any], Any]:
    network, optimizer = name.split("-", 1)
    build, samples = NETWORKS[network]
    problem = build(problems.digits(samples))
    chosen, factory = ROWS[name], OPTIMIZERS[optimizer]
    dynamics = rj.dynamics(factory, problem.loss)
    state = trained(factory, problem.loss, problem.params, chosen)
    start = rj.training.window(dynamics, *state, step=chosen.trained, lr=chosen.lr)
    lrs = chosen.lr * 2.0 ** np.linspace(-2, 3, lanes)
    ahead = partial(rj.training.forecast, dynamics, start, steps, lrs=lrs)
    data = ahead(flows=FLOWS, runs=True)
    # Of what all models are asked for alone: their losses; compiled before.
    options: dict[str, Any] = {"metrics": (), "every": steps}
    costs = {}
    for one in ("run", *FLOWS):
        flows = [] if one == "run" else [one]
        alone = partial(ahead, flows=flows, runs=one == "run", **options)
        first = seconds(alone)
        costs[one] = {"seconds": seconds(alone), "first": first}
    return {"flows": judged(data), "costs": costs, "lrs": lrs}, data


def main() -> None:
    parser = arguments(__doc__, "forecast")
    parser.add_argument("--rows", type=words, default=list(ROWS), help="of the table")
    parser.add_argument("--steps", type=int, default=200, help="ahead")
    parser.add_argument("--lanes", type=int, default=16, help="learning rates")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"steps": given.steps, "rows": {}}
    titles = ["row", "flow", "rank", "rank, not lost", "error, median", "error, worst"]
    titles += ["lost called", "false alarms", "diverged called", "time / runs"]
    print(head(titles))
    for name in given.rows:
        found["rows"][name], data = measured(name, given.steps, given.lanes)
        costs = found["rows"][name]["costs"]
        for flow, one in found["rows"][name]["flows"].items():
            ratio = costs[flow]["seconds"] / costs["run"]["seconds"]
            cells = [
                name,
                flow,
                f"{one['rank_correlation']:.3f}",
                f"{one['rank_correlation_not_lost']:.3f}",
                f"{one['median_relative_error']:.3f}",
                f"{one['worst_relative_error']:.3f}",
                f"{one['called']} of {one['lost']}",
                f"{one['false_alarms']}",
                f"{one['diverged_called']} of {one['diverged']}",
                f"{ratio:.1f}",
            ]
            print(row(cells), flush=True)
        rj.plot_forecast(data, name).savefig(given.out / f"{name}.png", dpi=100)
        (given.out / f"{name}.txt").write_text(rj.training.table(data) + "\n")
        write(given.out / "forecast.json", found, indent=1)


if __name__ == "__main__":
    main()
