"""The minimal example of the edge of stability: what each flow makes of it."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import field, walk

import rodjax as rj
from rodjax.flows import (
    CovarianceState,
    EdgeState,
    ModulatedState,
    RodState,
    central,
    covariance,
    edge,
    modulated,
    rod,
)
from rodjax.transforms import edge_gradient_descent

ETA, EPS, ZETA = 0.3, 0.01, 1.0
VALLEY = rj.problems.berthier(eps=EPS, zeta=ZETA)
SGD = rj.dynamics(optax.sgd(ETA), VALLEY.loss)
EDGE = 2.0 / ETA
#: The cycle x = ±SWING at height LEVEL, which gradient descent keeps.
SWING, LEVEL = (2.0 * EPS) ** 0.5, EDGE + 2.0 * EPS * ZETA
# The toy has no rounding to grow from: x = 0 is invariant, so there is no floor.
FLOWS = {
    "central": central(SGD),
    "edge": edge(SGD, floor=0.0),
    "rod": rod(SGD),
    "bundle": rod(SGD, rank=2),
    "covariance": covariance(SGD, rank=2, floor=0.0),
    "modulated": modulated(SGD, floor=0.0),
}
NEAR, FAR = (0.1, 6.2), (0.01, 5.0)
WARM, STEPS = 6, 1800


def point(x, y):
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def along(x):
    return point(x, 0.0)


def norm(*trees):
    return float(optax.tree.norm(trees))


class Path(NamedTuple):
    """A run or a flow at all whole steps."""

    steps: Any
    height: Any
    amplitude: Any


@lru_cache
def walker(name):
    """Window -> height and amplitude at whole steps, by Heun's method."""
    flow = FLOWS[name]

    def look(y):
        centre, ends = flow.centre(y).params, flow.observe(y, lr=None)[0]
        off = jax.tree.map(lambda e, c: e - c[None], ends, centre)
        return centre["y"], optax.tree.norm(off) / len(ends["y"]) ** 0.5

    def states(begin):
        y = flow.init(begin, lr=None, key=jax.random.key(0))
        return jax.vmap(look)(walk(flow, y, STEPS))

    return jax.jit(states)


@lru_cache
def solve(name, start):
    """The path from a window on, of a flow or of the "run"."""
    begin = rj.warm_up(SGD, point(*start), WARM)
    steps = WARM + np.arange(STEPS + 1.0)
    if name == "run":
        run = rj.descend(SGD, begin, STEPS)
        return Path(steps, np.asarray(run.params["y"]), run.metrics["amplitude"])
    steps = steps + FLOWS[name].offset
    return Path(steps, *map(np.asarray, walker(name)(begin)))


def onset(path):
    """The first step at which the amplitude rises through half the cycle's."""
    size = np.asarray(path.amplitude)
    up = (size[:-1] < SWING / 2) & (size[1:] >= SWING / 2)
    return float(path.steps[1:][np.argmax(up)]) if up.any() else np.inf


# --- stationary points ---------------------------------------------------------------


def test_gradient_descent_keeps_the_cycle():
    after = SGD.update(SGD.init(point(SWING, LEVEL))).params
    np.testing.assert_allclose([after["x"], after["y"]], [-SWING, LEVEL], rtol=1e-14)


@pytest.mark.parametrize("bea", [True, False])
def test_modulated_and_rod_are_stationary_on_the_cycle(bea):
    mean = SGD.init(point(0.0, LEVEL))
    delta = (along(SWING), *mean.phase[1:])
    y = ModulatedState(mean, delta, jnp.zeros(()), jnp.zeros(()))
    dy = field(modulated(SGD, bea=bea, floor=0.0), y)
    assert norm(dy.mean.phase, dy.delta) < 1e-14
    rods = ({"x": jnp.array([SWING]), "y": jnp.zeros(1)}, *mean.phase[1:])
    dy = field(rod(SGD, bea=bea), RodState(mean, rods))
    # Up to the ridge of its projection.
    assert norm(dy.mean.phase, dy.extent) < 1e-8
    # At the edge itself neither is: x^2 flattens the well.
    y = y._replace(mean=SGD.init(point(0.0, EDGE)))
    dy = field(modulated(SGD, bea=bea, floor=0.0), y)
    assert norm(dy.delta) > 0.9 * ETA * 2 * EPS * ZETA * SWING


def on_edge(y, radius):
    """The edge flow at the centre (0, y), oscillating along x."""
    mean = SGD.init(point(0.0, y))
    return EdgeState(mean, (along(1.0), *mean.phase[1:]), jnp.asarray(radius))


def test_edge_is_stationary_at_two_over_eta():
    """At x = 0, y = 2 / eta, r^2 = 2 eps, whatever zeta; and so is its unit step."""
    y = on_edge(EDGE, SWING)
    dy = field(edge(SGD), y)
    assert norm(dy.mean.phase, dy.direction, dy.radius) < 1e-14
    tx, params = edge_gradient_descent(ETA), y.mean.params
    before = tx.init(params)._replace(direction=y.direction[0], radius=y.radius)
    updates, after = tx.update(params, before, params, value_fn=VALLEY.loss)
    assert norm(updates) < 1e-15
    np.testing.assert_allclose(after.radius, SWING, rtol=1e-14)
    for off in (0.99, 1.01):  # r' = (eta y - 2) r
        dy = field(edge(SGD), on_edge(off * EDGE, SWING))
        np.testing.assert_allclose(dy.radius, 2.0 * (off - 1.0) * SWING, rtol=1e-9)


def on_covariance(y, sizes):
    mean = SGD.init(point(0.0, y))
    sizes = jnp.asarray(sizes)
    return CovarianceState(mean, {"x": sizes, "y": jnp.zeros_like(sizes)})


def test_covariance_is_stationary_at_two_over_eta():
    """At x = 0, y = 2 / eta, Sigma = 2 eps e e^T, however the columns share it."""
    y = on_covariance(EDGE, SWING * jnp.array([0.6, 0.8]))
    dy = field(covariance(SGD, rank=2), y)
    assert norm(dy.mean.phase, dy.factor) < 1e-14
    # Sigma' / Sigma = eta y (eta y - 2)
    y = on_covariance(1.01 * EDGE, [SWING])
    dy = field(covariance(SGD, rank=1), y)
    growth = 2.0 * float(dy.factor["x"][0]) / SWING
    np.testing.assert_allclose(growth, 2.02 * 0.02, rtol=1e-9)


def orbit(flow, y):
    """The states of 1200 steps."""
    return jax.jit(lambda y: walk(flow, y, 1200))(y)


def test_edge_orbits_undamped():
    """E = (eta y - 2)^2 / 2 + eta^2 (r^2 / 4 - eps ln r) is conserved.

    The mean of eta y - 2 is the growth of ln r, so over an orbit nothing.
    """
    path = orbit(FLOWS["edge"], on_edge(EDGE, 0.3))
    r, y = np.asarray(path.radius), np.asarray(path.mean.params["y"])
    energy = 0.5 * (ETA * y - 2.0) ** 2 + ETA**2 * (r**2 / 4 - EPS * np.log(r))
    np.testing.assert_allclose(energy, energy[0], rtol=1e-3)
    assert np.ptp(y) > 0.2 and np.ptp(y[-300:]) > 0.9 * np.ptp(y)
    np.testing.assert_allclose(y.mean() / EDGE, 1.0, atol=1e-3)


def test_covariance_orbits_undamped():
    """E = eta^2 y^3 / 3 - eta y^2 + eta (s / 2 - eps ln s) is, with s = |Sigma|."""
    path = orbit(covariance(SGD, rank=1, floor=0.0), on_covariance(EDGE, [0.3]))
    s, y = np.asarray(path.factor["x"][:, 0]) ** 2, np.asarray(path.mean.params["y"])
    energy = ETA**2 * y**3 / 3 - ETA * y**2 + ETA * (s / 2 - EPS * np.log(s))
    swing = np.ptp(ETA * (s / 2 - EPS * np.log(s)))
    np.testing.assert_allclose(energy, energy[0], atol=1e-2 * swing)
    assert np.ptp(y) > 0.2 and np.ptp(y[-300:]) > 0.9 * np.ptp(y)


# --- trajectories --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "modulated", "bundle"])
def test_settles_on_the_cycle(name):
    path = solve(name, NEAR)
    np.testing.assert_allclose(path.height[-300:].mean(), LEVEL, atol=2e-4)
    np.testing.assert_allclose(path.height[-1], LEVEL, atol=2e-3)
    np.testing.assert_allclose(path.amplitude[-1], SWING, rtol=0.02)


@pytest.mark.parametrize("start", [NEAR, FAR])
def test_central_holds_the_edge_exactly(start):
    path = solve("central", start)
    np.testing.assert_allclose(path.height[-300:], EDGE, rtol=1e-9)
    np.testing.assert_allclose(path.amplitude[-300:], SWING, rtol=1e-6)
    # It cannot overshoot: the oscillation is there as soon as the edge is.
    assert path.height.max() < EDGE + 1e-6


@pytest.mark.parametrize("start", [NEAR, FAR])
def test_onset_of_gradient_descent_is_delayed(start):
    """While x is small y rises by eta eps, and x multiplies by 1 - eta y.

    What it lost below the edge it must regain above: the flow that remembers how much
    that was is late by as much; the central flow is at the edge when it gets there.
    """
    run = solve("run", start)
    y = run.height[0] + ETA * EPS * np.arange(STEPS)
    growth = np.cumsum(np.log(abs(1.0 - ETA * y))) + np.log(run.amplitude[0])
    late = WARM + 1 + int(np.argmax((growth > np.log(SWING / 2)) & (y > EDGE)))
    found = onset(run)
    assert abs(late - found) < 0.015 * found
    assert abs(onset(solve("modulated", start)) - found) < 0.005 * found
    reached = (EDGE - start[1]) / (ETA * EPS)
    assert abs(onset(solve("central", start)) - reached) < 5 and reached < 0.5 * found


@pytest.mark.parametrize("start", [NEAR, FAR])
def test_onset_of_the_edge_flow(start):
    """r grows by eta y - 2, so it has regained as soon above the edge as below."""
    path = solve("edge", start)
    t, r = np.arange(STEPS), path.amplitude[0]
    y = float(path.height[0]) + ETA * EPS * t
    growth = np.cumsum(ETA * y - 2.0) + np.log(r)
    late = WARM + 1 + int(np.argmax((growth > np.log(SWING / 2)) & (y > EDGE)))
    assert abs(onset(path) - late) < 0.015 * late
    # The optimizer loses ln|1 - s| below the edge and gains ln(1 + s): it is later.
    assert onset(path) < onset(solve("run", start)) - 5


def test_single_rod_misses_the_onset_and_two_catch_it():
    """The lone rod points along the drift, of length eta eps / 2, and y rises on."""
    lost = solve("rod", NEAR)
    np.testing.assert_allclose(np.diff(lost.height)[-300:], ETA * EPS, rtol=1e-6)
    np.testing.assert_allclose(lost.amplitude[-300:], ETA * EPS / 2, rtol=1e-4)
    caught, run = solve("bundle", NEAR), solve("run", NEAR)
    assert abs(onset(caught) - onset(run)) < 0.05 * onset(run)
    # From far below what is left of the second rod is rounding.
    assert solve("bundle", FAR).height[-1] > EDGE + 3.0
