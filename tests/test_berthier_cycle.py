"""The cycle of gradient descent on Berthier's example, and swings about it, in flows.

The loss is cubic, so that the update map is quadratic: its mean over the ends of a rod,
and half of their difference, are exact in every flow. All of them therefore stand still
on the very cycle of gradient descent. They differ in how they swing about it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import berthier_cycle, walk
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.flows import (
    CovarianceState,
    EdgeState,
    ModulatedState,
    RodState,
    covariance,
    edge,
    modulated,
    rod,
)
from rodjax.transforms import edge_gradient_descent

ETA, EPS, ZETA = 0.3, 0.01, 1.0
EDGE = 2.0 / ETA
HERE = berthier_cycle(ETA, EPS, ZETA)


def valley(zeta=ZETA):
    return rj.dynamics(optax.sgd(ETA), rj.problems.berthier(eps=EPS, zeta=zeta).loss)


SGD = valley()


def point(x, y):
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def on_edge(dynamics, at):
    """The edge flow on a cycle."""
    mean, radius = dynamics.init(point(at.c, at.m)), math.hypot(at.d, at.k)
    unit = point(at.d / radius, at.k / radius)
    return EdgeState(mean, (unit, *mean.phase[1:]), jnp.asarray(radius))


#: name -> the flow, without a floor, and its state on a cycle.
HELD = {
    "modulated": lambda sgd, at: (modulated(sgd, floor=0.0), on_modulated(sgd, at)),
    "modulated, plain": lambda sgd, at: (
        modulated(sgd, degree=1, floor=0.0),
        on_modulated(sgd, at),
    ),
    "rod": lambda sgd, at: (rod(sgd), on_rod(sgd, at)),
    "rod, plain": lambda sgd, at: (rod(sgd, order=1), on_rod(sgd, at)),
    "edge": lambda sgd, at: (edge(sgd, floor=0.0), on_edge(sgd, at)),
    "covariance": lambda sgd, at: (
        covariance(sgd, rank=2, floor=0.0),
        on_covariance(sgd, at, [0.6, 0.8]),
    ),
}


def on_modulated(dynamics, at):
    mean = dynamics.init(point(at.c, at.m))
    delta = (point(at.d, at.k), *mean.phase[1:])
    return ModulatedState(mean, delta, jnp.zeros(()), jnp.zeros(()))


def on_rod(dynamics, at):
    mean = dynamics.init(point(at.c, at.m))
    rods = {"x": jnp.array([at.d]), "y": jnp.array([at.k])}
    return RodState(mean, (rods, *mean.phase[1:]))


def on_covariance(dynamics, at, shares):
    """However the columns share it."""
    mean, shares = dynamics.init(point(at.c, at.m)), jnp.asarray(shares)
    return CovarianceState(mean, {"x": at.d * shares, "y": at.k * shares})


def moving(y):
    """What a flow moves: the centre and whatever stands for the oscillation."""
    names = ("delta", "extent", "direction", "radius", "factor")
    shown = {name: getattr(y, name) for name in names if hasattr(y, name)}
    return {"centre": y.mean.phase, **shown}


def test_gradient_descent_keeps_the_cycle():
    after = SGD.update(SGD.init(point(HERE.c + HERE.d, HERE.m + HERE.k))).params
    expected = [HERE.c - HERE.d, HERE.m - HERE.k]
    np.testing.assert_allclose([after["x"], after["y"]], expected, rtol=1e-13)


class Near(NamedTuple):
    """The rate at a cycle, and where y is 2 / eta; the growth of small swings."""

    still: float
    moved: float
    growth: float


@lru_cache
def near(name, zeta):
    """What a flow does about the cycle; the growth is per step, over eta^2 eps."""
    at = berthier_cycle(ETA, EPS, zeta)
    flow, y = HELD[name](valley(zeta), at)
    flat, unravel = ravel_pytree(moving(y))

    def rates(vector):
        parts = unravel(vector)
        mean = y.mean._replace(phase=parts.pop("centre"))
        found = flow.vector_field(0.0, y._replace(mean=mean, **parts), None)
        return ravel_pytree(moving(found))[0]

    here, off = np.asarray(flat), 1e-6 * np.eye(flat.size)
    lower, _ = ravel_pytree(moving(HELD[name](valley(zeta), at._replace(m=EDGE))[1]))
    points = np.concatenate([np.stack([here, lower]), here + off, here - off])
    still, moved, *around = np.asarray(jax.jit(lambda p: jax.lax.map(rates, p))(points))
    up, down = np.split(np.stack(around), 2)
    values = np.linalg.eigvals((up - down).T / 2e-6)
    # The pair whose frequency is that of a' = eta a u, u' = eta (1 - a^2 / 2).
    (swings,) = values[abs(values / (ETA * (2 * EPS) ** 0.5) - 1j) < 0.1]
    norm = np.linalg.norm
    return Near(norm(still), norm(moved), swings.real / (ETA**2 * EPS))


def some(*quick):
    """All names, of which those not given are left to the longer checks."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in HELD]


@pytest.mark.parametrize("name", some("modulated", "rod", "edge"))
def test_stationary_on_the_cycle(name):
    found = near(name, 0.4)
    # Up to the ridge of the rod's projection.
    assert found.still < 1e-8
    # Not where the sharpness without the centre of x would be 2 / eta.
    assert found.moved > 1e-5


@pytest.mark.parametrize("zeta", [0.4, pytest.param(0.6, marks=pytest.mark.slow)])
def test_modulated_damps_small_swings_as_gradient_descent_does(zeta):
    """By (9 zeta^2 - 2) / 2, so that it knows on which side of 2/9 zeta^2 is."""
    truth = (2 - 9 * zeta**2) / 2
    np.testing.assert_allclose(near("modulated", zeta).growth, truth, atol=0.01)


@pytest.mark.parametrize("name", some("rod", "edge")[1:])
def test_the_others_damp_them_by_more(name):
    """By 9 zeta^2 / 2: what the steps' length adds is in modulated's BEA alone."""
    np.testing.assert_allclose(near(name, 0.4).growth, -4.5 * 0.4**2, atol=0.01)


def test_the_unit_step_of_the_edge_flow_keeps_the_cycle():
    y, tx = on_edge(SGD, HERE), edge_gradient_descent(ETA)
    params = y.mean.params
    before = tx.init(params)._replace(direction=y.direction[0], radius=y.radius)
    step = jax.jit(lambda w, s: tx.update(w, s, w, value_fn=SGD.loss))
    updates, after = step(params, before)
    assert float(optax.tree.norm(updates)) < 1e-15
    np.testing.assert_allclose(after.radius, y.radius, rtol=1e-14)


def orbit(flow, y):
    """The states of 1200 steps."""
    return jax.jit(lambda y: walk(flow, y, 1200))(y)


def test_edge_orbits_undamped_where_x_is_not_skewed():
    """With zeta = 0, E = (eta y - 2)^2 / 2 + eta^2 (r^2 / 4 - eps ln r) is conserved.

    The mean of eta y - 2 is the growth of ln r, so over an orbit nothing.
    """
    sgd = valley(0.0)
    begin = on_edge(sgd, berthier_cycle(ETA, EPS, 0.0))
    path = orbit(edge(sgd, floor=0.0), begin._replace(radius=jnp.asarray(0.3)))
    r, y = np.asarray(path.radius), np.asarray(path.mean.params["y"])
    energy = 0.5 * (ETA * y - 2.0) ** 2 + ETA**2 * (r**2 / 4 - EPS * np.log(r))
    np.testing.assert_allclose(energy, energy[0], rtol=1e-3)
    assert np.ptp(y) > 0.2 and np.ptp(y[-300:]) > 0.9 * np.ptp(y)
    np.testing.assert_allclose(y.mean() / EDGE, 1.0, atol=1e-3)


@pytest.mark.slow
def test_covariance_orbits_undamped_where_x_is_not_skewed():
    """E = eta^2 y^3 / 3 - eta y^2 + eta (s / 2 - eps ln s) is, with s = |Sigma|."""
    sgd = valley(0.0)
    at = berthier_cycle(ETA, EPS, 0.0)._replace(d=0.3)
    path = orbit(covariance(sgd, rank=1, floor=0.0), on_covariance(sgd, at, [1.0]))
    s, y = np.asarray(path.factor["x"][:, 0]) ** 2, np.asarray(path.mean.params["y"])
    energy = ETA**2 * y**3 / 3 - ETA * y**2 + ETA * (s / 2 - EPS * np.log(s))
    swing = np.ptp(ETA * (s / 2 - EPS * np.log(s)))
    np.testing.assert_allclose(energy, energy[0], atol=1e-2 * swing)
    assert np.ptp(y) > 0.2 and np.ptp(y[-300:]) > 0.9 * np.ptp(y)
