"""Every flow on the reference problem: accuracy, sharpness, and cost a step.

Gradient descent at learning rate 0.6 on the digits MLP (64-16-16-10, tanh, 100
samples), float64: 20 steps, then 240 compared, during which the sharpness reaches its
threshold. Each flow starts from the run's window and takes four substeps a step. Times
are warm, without compilation and without metrics, the best of several runs in turn with
plain jitted gradient descent, to whose time each is related.

    python benchmarks/reference.py
    python benchmarks/reference.py --solver euler --flows central,modulated
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import optax
from _common import arguments, head, row, seconds, words, write

import rodjax as rj

LR, WARMUP, STEPS, SUBSTEPS = 0.6, 20, 240, 4
REPEATS = 7
SOLVERS = {
    "heun": diffrax.Heun,
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "tsit5": diffrax.Tsit5,
}
FLOWS = {
    "stable": rj.flows.stable,
    "gradient": rj.flows.gradient,
    "igr": rj.flows.igr,
    "third order": rj.flows.third_order,
    "principal, rank 3": partial(rj.flows.principal, rank=3),
    "rod": rj.flows.rod,
    "bundle of 3": partial(rj.flows.rod, rank=3),
    "modulated": rj.flows.modulated,
    "edge": rj.flows.edge,
    "central, rank 3": rj.flows.central,
    "central, rank 2": partial(rj.flows.central, rank=2),
    "covariance": rj.flows.covariance,
}
COLUMNS = {
    "final_distance": "final distance",
    "mean_distance": "mean distance",
    "final_loss": "final loss",
    "final_sharpness_ratio": "final S/threshold",
    "median_sharpness_ratio": "median S/threshold",
    "evaluations a call": "gradients a call",
    "products a call": "products a call",
    "ms a step": "ms a step",
    "times GD": "times GD's step",
}


def plain_descent(problem: rj.problems.Problem, params: Any) -> Callable[[], Any]:
    """Optax's gradient descent alone, in one compiled scan."""
    optimizer = optax.sgd(LR)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(problem.loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[0]

    return lambda: descend(params)


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "reference.json")
    parser.add_argument("--flows", default="", help="comma-separated; all if none")
    parser.add_argument("--solver", default="heun", choices=SOLVERS)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    problem = rj.problems.digits_mlp(dtype="float64")
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    edge = (rj.edge_of_stability(dynamics),)
    window = rj.warm_up(dynamics, problem.params, WARMUP, lr=LR)
    run = rj.descend(dynamics, window, STEPS, lr=LR, metrics=edge)
    descend = plain_descent(problem, window.at(0).params)
    jax.block_until_ready(descend())

    wanted = words(options.flows)
    print(head(["flow", *COLUMNS.values()]))
    results = {}
    for name, build in FLOWS.items():
        if wanted and not any(name.startswith(word) for word in wanted):
            continue
        flow = build(dynamics)
        settings: dict[str, Any] = {
            "lr": LR,
            "substeps": SUBSTEPS,
            "solver": SOLVERS[options.solver](),
        }
        path = rj.integrate(flow, window, STEPS, metrics=edge, **settings)
        found: dict[str, float] = rj.compare(run, path).summary()
        solve = partial(rj.integrate, flow, window, STEPS, every=STEPS, **settings)
        seconds(solve)
        # In turn, so that whatever else the machine does slows both.
        times = [(seconds(solve), seconds(descend)) for _ in range(REPEATS)]
        own, base = (min(column) for column in zip(*times, strict=True))
        found |= {
            "evaluations a call": flow.evaluations,
            "products a call": flow.products,
            "ms a step": 1e3 * own / STEPS,
            "times GD": own / base,
        }
        results[name] = found
        print(row([name, *(f"{found[key]:.4g}" for key in COLUMNS)]), flush=True)
        write(options.out, {"solver": options.solver, "flows": results}, indent=2)
    # The optimizer itself has no distance; its figures close the table.
    base = min(seconds(descend) for _ in range(REPEATS))
    ratio = run.metrics["sharpness_ratio"]
    print(
        f"\nthe run itself: loss {float(run.metrics['loss'][-1]):.4g}, S/threshold at "
        f"the end {float(ratio[-1]):.4g}, at most {float(ratio.max()):.4g}; plain GD "
        f"{1e3 * base / STEPS:.4g} ms a step"
    )


if __name__ == "__main__":
    main()
