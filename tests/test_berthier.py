"""Berthier's examples of the edge of stability: what each flow makes of them."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import berthier_cycle, dense_hessian, lane, order, walk

import rodjax as rj
from rodjax.flows import central, covariance, edge, modulated, rod

ETA, EPS, ZETA = 0.3, 0.01, 1.0
EDGE = 2.0 / ETA


SGD = rj.dynamics(optax.sgd(ETA), rj.problems.berthier(eps=EPS, zeta=ZETA).loss)
FLOWS = {
    "central": central(SGD),
    "edge": edge(SGD),
    "rod": rod(SGD),
    "bundle": rod(SGD, rank=2),
    "covariance": covariance(SGD, rank=2),
    "modulated": modulated(SGD),
}
#: Of the second one the oscillation dies down to rounding errors below the edge.
NEAR, FAR = (0.1, 6.2), (0.0, 5.0)
WARM, STEPS = 6, 1800


HERE = berthier_cycle(ETA, EPS, ZETA)
SWING, LEVEL = math.hypot(HERE.d, HERE.k), HERE.m


def point(x, y):
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


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
        return Path(
            steps, np.asarray(run.params["y"]), np.asarray(run.metrics["amplitude"])
        )
    steps = steps + FLOWS[name].offset
    return Path(steps, *map(np.asarray, walker(name)(begin)))


def onset(path):
    """The first step at which the amplitude rises through half the cycle's."""
    size = path.amplitude
    up = (size[:-1] < SWING / 2) & (size[1:] >= SWING / 2)
    return float(path.steps[1:][np.argmax(up)]) if up.any() else np.inf


@pytest.mark.parametrize(
    "name",
    [
        *("run", "modulated", "edge", "bundle"),
        pytest.param("covariance", marks=pytest.mark.slow),
    ],
)
def test_settles_on_the_cycle(name):
    path = solve(name, NEAR)
    np.testing.assert_allclose(path.height[-300:].mean(), LEVEL, atol=3e-4)
    np.testing.assert_allclose(path.height[-1], LEVEL, atol=5e-3)
    np.testing.assert_allclose(path.amplitude[-1], SWING, rtol=0.01)


@pytest.mark.parametrize("start", [NEAR, FAR])
def test_central_holds_the_edge_exactly(start):
    """There y is not 2 / eta: the centre of x takes part in the sharpness."""
    path = solve("central", start)
    np.testing.assert_allclose(path.height[-300:], LEVEL, rtol=1e-9)
    np.testing.assert_allclose(path.amplitude[-300:], SWING, rtol=1e-6)
    # It cannot overshoot: the oscillation is there as soon as the edge is.
    assert path.height.max() < LEVEL + 1e-6
    # Where the drift alone brings the sharpness, y + 3 zeta eps / y, to 2 / eta.
    reached = (EDGE - 3 * ZETA * EPS / EDGE - start[1]) / (ETA * EPS)
    assert abs(onset(path) - reached) < 6


def foreseen(path, growth, since, small=None):
    """The onset of what grows by so much of its logarithm a step, from a step on."""
    if small is None:
        small = path.amplitude[since]
    y = path.height[since] + ETA * EPS * np.arange(STEPS - since)
    s = ETA * (y + 3 * ZETA * EPS / y) - 1.0
    size = np.log(small) + np.cumsum(growth(s))
    return WARM + since + 1 + int(np.argmax((size > np.log(SWING / 2)) & (s > 1)))


#: A step at which the sharpness is 2 / eta, from far.
CROSSED = 549


def test_onset_of_gradient_descent_is_delayed():
    """While x is small y rises by eta eps, and x multiplies by 1 - eta S.

    What it lost below the edge it must regain above.
    """
    run = solve("run", NEAR)
    expected = foreseen(run, lambda s: np.log(abs(s)), 0)
    assert abs(expected - onset(run)) < 0.015 * onset(run)
    assert onset(run) > onset(solve("central", NEAR)) + 150


def test_onset_from_rounding_errors():
    """From far nothing is left at the edge but an error in the last place of x."""
    run, small = solve("run", FAR), np.finfo(float).eps * EPS / EDGE
    expected = foreseen(run, np.log, CROSSED, small)
    assert abs(expected - onset(run)) < 0.015 * onset(run)


def test_onset_of_the_modulated_flow():
    assert abs(onset(solve("modulated", NEAR)) - onset(solve("run", NEAR))) < 2
    # From far its floor is that of float64 at |w| = 5, the run's at |x| = 0.0015.
    path, run = solve("modulated", FAR), solve("run", FAR)
    expected = foreseen(path, np.log, CROSSED)
    assert abs(onset(path) - expected) < 0.02 * expected
    assert 0.95 * onset(run) < onset(path) < onset(run)
    np.testing.assert_allclose(path.height.max(), run.height.max(), rtol=0.02)


@pytest.mark.parametrize(("start", "since"), [(NEAR, 0), (FAR, CROSSED)])
def test_onset_of_the_edge_flow(start, since):
    """r grows by eta S - 2, so it has regained as soon above the edge as below."""
    path = solve("edge", start)
    expected = foreseen(path, lambda s: s - 1.0, since)
    assert abs(onset(path) - expected) < 0.02 * expected
    # The optimizer loses ln|1 - s| below the edge and gains ln(1 + s): it is later.
    assert onset(path) < onset(solve("run", start)) - 5


def test_single_rod_misses_the_onset_and_two_catch_it():
    """The lone rod points along the drift, of length eta eps / 2, and y rises on."""
    lost = solve("rod", NEAR)
    assert lost.height.max() > EDGE + 3.0
    early = slice(300, 1000)
    np.testing.assert_allclose(np.diff(lost.height[early]), ETA * EPS, rtol=1e-4)
    np.testing.assert_allclose(lost.amplitude[early], ETA * EPS / 2, rtol=1e-3)
    caught, run = solve("bundle", NEAR), solve("run", NEAR)
    assert abs(onset(caught) - onset(run)) < 0.05 * onset(run)
    # From far below what is left of the second rod is rounding.
    assert solve("bundle", FAR).height[-1] > EDGE + 3.0


# --- the other two -------------------------------------------------------------------


@pytest.mark.slow
def test_central_slides_along_the_circle():
    """The flow constrained to the edge is what it is, to the order eps."""
    radius, sizes, errors = EDGE - 3.0, (0.02, 0.01, 0.005), []
    reached = (radius**2 - 4.0) ** 0.5
    for eps in sizes:
        problem = rj.problems.berthier_circle(eps=eps)
        sgd = rj.dynamics(optax.sgd(ETA), problem.loss)
        every = round(2 / eps)
        path = rj.integrate(
            central(sgd, rank=1), problem.params, 15 * every, every=every
        )
        time = ETA * eps * np.asarray(path.steps)
        late = np.exp(-np.maximum(time - reached, 0.0) / radius)
        angle = 2 * np.arctan(np.tan(math.atan2(2.0, reached) / 2) * late)
        edge = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
        free = np.stack([time, np.full_like(time, 2.0)], 1)
        truth = np.where((late < 1)[:, None], edge, free)
        errors.append(
            np.linalg.norm(np.asarray(path.params["y"]) - truth, axis=1).max()
        )
        ratio = ETA / 2 * rj.sharpness(sgd.loss, lane(path.params, -1)).value
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)
    assert errors[-1] < 0.02 and abs(order(sizes, errors) - 1.0) < 0.1


@pytest.mark.slow
def test_central_holds_two_eigenvalues_at_the_edge():
    """Where its oscillation, of rank two, has the mean square of the iterates'."""
    problem = rj.problems.berthier_matrix(eps=EPS)
    sgd = rj.dynamics(optax.sgd(ETA), problem.loss)
    path = rj.integrate(central(sgd, rank=2), problem.params, 1500, every=500)
    ends = np.asarray(path.ends["x"][-1])
    square = ends.T @ ends / len(ends)
    forcing = np.array([[2.0, 2**-0.5], [2**-0.5, 1.0]])
    np.testing.assert_allclose(square / EPS, 2 * forcing, atol=1e-3)
    last = lane(path.params, -1)
    top = np.linalg.eigvalsh(dense_hessian(sgd.loss, last))[-2:]
    np.testing.assert_allclose(top, EDGE, rtol=1e-6)
