"""The rows of `accuracy.py`: networks, optimizers, windows; how one is measured."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import rodjax as rj
from rodjax import problems, transforms

NETWORKS: Mapping[str, Callable[..., problems.Problem]] = {
    "mlp": problems.mlp,
    "cnn": problems.cnn,
    "vit": problems.vit,
}
OPTIMIZERS: Mapping[str, Callable[[Any], optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "heavy-ball": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "rmsprop": partial(optax.rmsprop, decay=0.99),
    "scalar-rmsprop": partial(transforms.scalar_rmsprop, decay=0.99),
    "adam": partial(optax.adam, b2=0.99),
    "scalar-adam": partial(transforms.scalar_adam, b2=0.99),
    "nadam": partial(optax.nadam, b2=0.99),
    "scalar-nadam": partial(transforms.scalar_nadam, b2=0.99),
}


class Window(NamedTuple):
    """`warmup` steps, then `steps` compared; no `lr` is one to be found by `choose`."""

    lr: float | None = None
    warmup: int = 20
    steps: int = 400


# Those on digits, in float32.
WINDOWS: Mapping[str, Window] = {
    "mlp-gd": Window(0.6, steps=600),
    "mlp-heavy-ball": Window(1.0, 100, 600),
    "mlp-nesterov": Window(0.5, 100, 600),
    "mlp-rmsprop": Window(8e-4, steps=600),
    "mlp-scalar-rmsprop": Window(0.035, steps=600),
    "mlp-adam": Window(0.025, steps=600),
    "mlp-scalar-adam": Window(0.1, 1500),
    "mlp-nadam": Window(6e-3, steps=600),
    "mlp-scalar-nadam": Window(0.45, steps=600),
    "cnn-gd": Window(0.38),
    "cnn-heavy-ball": Window(0.2, 500, 600),
    "cnn-nesterov": Window(0.085, 120, 600),
    "cnn-rmsprop": Window(3e-4),
    "cnn-scalar-rmsprop": Window(0.03),
    "cnn-adam": Window(0.03),
    "cnn-scalar-adam": Window(0.03, 1300),
    "cnn-nadam": Window(2e-3),
    "cnn-scalar-nadam": Window(0.55),
    "vit-gd": Window(0.08),
    "vit-heavy-ball": Window(0.14, 250, 600),
    "vit-nesterov": Window(0.065, 600),
    "vit-rmsprop": Window(3e-4, 60),
    "vit-scalar-rmsprop": Window(0.025, 60),
    "vit-adam": Window(6e-3, 320),
    "vit-scalar-adam": Window(0.06, 1400),
    "vit-nadam": Window(1e-3, 220),
    "vit-scalar-nadam": Window(0.1, 600),
}
# On mnist1d nothing was tuned: learning rates are found by `choose`.
OTHER_WINDOWS: Mapping[str, Window] = {
    **{f"mlp-{name}": Window() for name in OPTIMIZERS},
    **{f"cnn-{name}": Window() for name in ("gd", "rmsprop", "adam")},
}
SAMPLES = {"mlp": 100, "cnn": 50, "vit": 50}
WITHOUT_MOMENTUM = ("gd", "rmsprop", "scalar-rmsprop")
RANKS = {"central": 2}


class Model(NamedTuple):
    """A flow of the table, and the optimizers that it serves."""

    build: Callable[..., rj.flows.Flow]
    served: tuple[str, ...]


def models() -> dict[str, Model]:
    """All but those of gradient descent alone, three rods, and the third degree."""
    found = {}
    for name, record in rj.flows.REGISTRY.items():
        if record.serves == "gradient descent":
            continue
        served = tuple(OPTIMIZERS) if record.serves == "any" else WITHOUT_MOMENTUM
        options = {"rank": RANKS[name]} if name in RANKS else {}
        found[name] = Model(partial(record.build, **options), served)
        if name == "rod":
            found["bundle"] = Model(partial(record.build, rank=3), WITHOUT_MOMENTUM)
        if name == "modulated":
            found["modulated-3"] = Model(partial(record.build, degree=3), served)
    return found


FLOWS = models()
#: Beside the flows: the run itself, nudged by a rounding error.
LIMIT = "limit"
EVERY = 5
# Sharpness over threshold from which on a run counts as being at the threshold.
AT_THRESHOLD = 0.9
SHARE = 0.5
# Of the stable flow's final distance: what the horizon of a flow is passed by.
LOST = 0.05


def share_at_threshold(ratio: Any) -> float:
    """Of the saved steps of a run, the share at the threshold."""
    return float(np.mean(np.asarray(ratio) >= AT_THRESHOLD))


def choose(dynamics: rj.Dynamics, params: Any, window: Window) -> float:
    """The least learning rate of a grid that spends enough steps at the threshold."""
    lrs = 1e-4 * 2.0 ** np.arange(0, 16, 0.5)
    edge = (rj.edge_of_stability(dynamics),)
    # Few at a time from below: larger ones are not needed, and diverge.
    for some in np.split(lrs, 8):
        data = rj.sweep(
            dynamics,
            params,
            window.steps,
            grid={"lr": some},
            warmup=window.warmup,
            every=10,
            metrics=edge,
        ).sel(flow="run")
        for lr in some:
            lane = data.sel(lr=lr)
            ratio = lane.sharpness_ratio
            # Some room, since the run itself is looked at more often; not just near.
            enough = share_at_threshold(ratio) >= 1.2 * SHARE and ratio.max() > 1
            if enough and np.isnan(float(lane.diverged_at)):
                return float(lr)
    raise RuntimeError("no learning rate reaches the threshold for half of the steps")


def lacking(found: Mapping[str, Any] | None, flows: Collection[str]) -> list[str]:
    """Those of the flows that have not been measured."""
    known = found.get("flows", {}) if found else {}
    return [name for name in flows if name not in known]


def served(optimizer: str, flows: Collection[str]) -> list[str]:
    """Those of the flows that serve an optimizer."""
    return [name for name in flows if optimizer in FLOWS[name].served]


def horizon(compared: rj.Comparison, lost: float) -> float:
    """Steps until a distance passes `lost`, infinite if it does not."""
    passed = ~(np.asarray(compared.distance) <= lost)
    steps = np.asarray(compared.steps) - np.asarray(compared.steps)[0]
    return float(steps[np.argmax(passed)]) if passed.any() else math.inf


# The optimizer's whole state at the centre, for what is computed from it afterwards.
STATES = rj.Metric(
    lambda snapshot, *, lr: (),
    lambda snapshot, carry, *, lr: ({"state": snapshot.centre}, carry),
)


def measure(
    problem: problems.Problem,
    optimizer: str,
    window: Window,
    flows: Collection[str],
    found: Mapping[str, Any] | None,
    out: Path,
) -> dict[str, Any]:
    """The figures of one row and seed, those of `found` and what they lack.

    A picture and the trajectories of what is new go to `out`.
    """
    dynamics = rj.dynamics(OPTIMIZERS[optimizer], problem.loss)
    lr, warmup, steps = window
    if lr is None:
        lr = found["lr"] if found else choose(dynamics, problem.params, window)

    # Compiled once for all trajectories, which is why it is not recorded along them.
    @jax.jit
    def curvature(states: rj.State) -> dict[str, jax.Array]:
        def at(guess, state):
            top = rj.sharpness_ratio(dynamics, state, lr=lr, guess=guess)
            accuracy = problem.metrics["accuracy"](state.params)
            return top.vector, {"sharpness_ratio": top.value, "accuracy": accuracy}

        return jax.lax.scan(at, optax.tree.ones_like(problem.params), states)[1]

    def with_curvature(path: rj.Trajectory) -> rj.Trajectory:
        metrics = dict(path.metrics)
        more = curvature(metrics.pop("state"))
        return dataclasses.replace(path, metrics=metrics | more)

    start = rj.warm_up(dynamics, problem.params, warmup, lr=lr)
    whole, compared = dict(found or {}), {}
    if LIMIT not in whole:
        began = time.perf_counter()
        nudged = rj.predictability(dynamics, start, steps, lr=lr, every=EVERY)
        limit = nudged.summary() | {"seconds": time.perf_counter() - began}
        keys = "final_distance", "mean_distance", "diverged_at", "seconds"
        whole[LIMIT] = {key: limit[key] for key in keys}
        compared[LIMIT] = nudged
    known = whole.get("flows", {})
    missing = lacking(whole, flows)
    if missing:
        common: dict[str, Any] = {"lr": lr, "every": EVERY, "metrics": (STATES,)}
        run = with_curvature(rj.descend(dynamics, start, steps, **common))
        ratio = run.metrics["sharpness_ratio"]
        whole |= {
            "lr": lr,
            "warmup": warmup,
            "steps": steps,
            "share at threshold": share_at_threshold(ratio),
            "highest ratio": float(ratio.max()),
            "accuracy": float(run.metrics["accuracy"][-1]),
            "diverged at": float(run.diverged_at),
        }
        paths, summaries = {}, dict(known)
        for name in missing:
            began = time.perf_counter()
            flow = FLOWS[name].build(dynamics)
            paths[name] = with_curvature(rj.integrate(flow, start, steps, **common))
            compared[name] = rj.compare(run, paths[name])
            summaries[name] = compared[name].summary()
            summaries[name]["seconds"] = time.perf_counter() - began
        whole["flows"] = summaries
        if "stable" in summaries:
            # None of one that is lost with the run itself.
            final = summaries["stable"]["final_distance"]
            lost = math.inf if final is None else LOST * final
            for name, one in compared.items():
                own = whole[LIMIT] if name == LIMIT else summaries[name]
                own["horizon"] = horizon(one, lost)
        title = f"{problem.name}, {optimizer}, lr {lr:.3g}"
        rj.plot(run, paths, title).savefig(out.with_suffix(".png"), dpi=100)
        data = rj.dataset(run, paths, lr=lr)
        data.to_netcdf(out.with_suffix(".nc"), engine="h5netcdf")
    # Compiled programs of all rows together exhaust the compiler's memory.
    jax.clear_caches()
    # As it is written, for JSON has no NaN.
    return jax.tree.map(lambda x: x if math.isfinite(x) else None, whole)
