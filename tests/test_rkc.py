"""Runge-Kutta-Chebyshev: order, stability, estimate, and the map that `bea` follows."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import order

import rodjax as rj
from rodjax.solve._chebyshev import reaches

STAGES = (2, 3, 5, 10)
START = jnp.array([1.0, 0.5])


def pendulum(t, y, args):
    """Nonlinear, and not autonomous."""
    return jnp.stack([y[1], jnp.cos(3.0 * t) - jnp.sin(y[0]) - 0.5 * y[1]])


def end(field, solver, start, time, steps, args=None):
    solved = diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, 0.0, time, time / steps, start, args
    )
    return np.asarray(solved.ys[0])


def one_step(field, solver, start, size, args=None):
    """y1 and the estimate of its error."""
    terms = diffrax.ODETerm(field)
    state = solver.init(terms, 0.0, size, start, args)
    y1, error, *_ = solver.step(terms, 0.0, size, start, args, state, False)
    return np.asarray(y1), np.asarray(error)


def scaled(t, y, args):
    return args * y


@pytest.mark.parametrize("stages", STAGES)
def test_order(stages):
    exact = end(pendulum, diffrax.Dopri8(), START, 2.0, 400)
    grid = (32, 64, 128)
    solver = rj.RKC(stages=stages)
    errors = [
        np.max(np.abs(end(pendulum, solver, START, 2.0, n) - exact)) for n in grid
    ]
    assert abs(order(grid, errors) + 2) < 0.3, errors


@pytest.mark.parametrize("stages", STAGES)
def test_stable_down_to_its_reach_and_not_beyond(stages):
    reach = reaches(stages)[stages]
    assert abs(reach / (0.653 * (stages**2 - 1)) - 1) < 0.01
    factor = lambda rates: one_step(
        scaled, rj.RKC(stages=stages), jnp.ones_like(rates), 1.0, rates
    )[0]
    inside = np.abs(factor(jnp.linspace(-reach, -0.02 * reach, 400)))
    # Damped as published: the ripples of the polynomial stay below 1.
    assert np.max(inside) < 1.0
    assert np.abs(factor(jnp.array([-1.5 * reach])))[0] > 1.0


@pytest.mark.parametrize("size", [2.0, 3.0, 16.0])
def test_stable_with_bea(size):
    rates = jnp.linspace(-3.0, -0.05, 400)
    factor = one_step(scaled, rj.RKC(bea=True), jnp.ones_like(rates), size, rates)[0]
    assert np.max(np.abs(factor)) < 1.0


def test_as_few_stages_as_are_stable():
    solver = rj.RKC(radius=8.0)
    sizes = np.geomspace(0.5, 100.0, 30)
    stages = np.asarray(jax.vmap(solver.calls)(jnp.asarray(sizes)))
    reach = reaches(40)
    assert np.all(reach[stages] >= 8.0 * sizes)
    assert np.all((stages == 2) | (reach[stages - 1] < 8.0 * sizes))
    assert int(solver.calls(jnp.asarray(1e6))) == solver.most


@pytest.mark.parametrize("stages", [2, 5, 10])
def test_the_estimate_is_the_error(stages):
    """Of a decay at rate 1: of the same order, on the safe side of it, within twice."""
    sizes, estimates = np.array([0.05, 0.1, 0.2]), []
    for size in sizes:
        rates = jnp.array([-1.0])
        y1, estimate = one_step(scaled, rj.RKC(stages=stages), jnp.ones(1), size, rates)
        estimates.append(abs(estimate[0]))
        assert 1 < abs(estimate / (np.exp(-size) - y1))[0] < 2
    assert abs(order(sizes, estimates) - 3) < 0.1, estimates


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_with_bea_it_follows_the_map(size):
    """(1 + X)^h to second order in X, for a nonlinear map at whole h."""
    grid = np.array([0.01, 0.02, 0.04])
    solver = rj.RKC(bea=True)
    linear = [
        abs(
            one_step(scaled, solver, jnp.ones(1), size, jnp.array([-e]))[0][0]
            - (1 - e) ** size
        )
        for e in grid
    ]
    assert abs(order(grid, linear) - 3) < 0.2, linear
    if size >= 1:
        field = lambda t, y, e: e * jnp.stack([y[1] * y[0], -(y[0] ** 2) - y[1]])
        errors = []
        for e in grid:
            y = START
            for _ in range(int(size)):
                y = y + field(0.0, y, e)
            found = one_step(field, solver, START, size, jnp.asarray(e))[0]
            errors.append(np.max(np.abs(found - y)))
        # What is one step of the map is not exact where it is interpolated.
        assert order(grid, errors) > 2.7, errors


@pytest.mark.parametrize("size", [2.0, 4.0, 8.0])
def test_with_bea_the_estimate_is_of_the_size_of_the_error(size):
    rate = -0.1 / size
    rates = jnp.array([rate])
    y1, estimate = one_step(scaled, rj.RKC(bea=True), jnp.ones(1), size, rates)
    error = (1 + rate) ** size - y1
    assert 0.2 < np.abs(estimate / error)[0] < 5.0


@pytest.mark.parametrize("bea", [False, True])
def test_between_steps(bea):
    """Dense output, of the map with `bea`."""
    rate = -0.02
    solved = diffrax.diffeqsolve(
        diffrax.ODETerm(scaled),
        rj.RKC(bea=bea),
        *(0.0, 8.0, 4.0, jnp.array(1.0), jnp.array(rate)),
        saveat=diffrax.SaveAt(ts=jnp.arange(9.0)),
    )
    exact = (np.exp(rate), 1 + rate)[bea] ** np.arange(9.0)
    np.testing.assert_allclose(solved.ys, exact, atol=2e-4)


def test_derivatives_in_both_modes():
    def last(rate, adjoint, kind="checkpointed"):
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(scaled),
            rj.RKC(scan_kind=kind),
            *(0.0, 4.0, 0.5, jnp.array(1.0), rate),
            adjoint=adjoint,
        )
        return solved.ys[0]

    rate = jnp.array(-0.7)
    reverse = jax.grad(last)(rate, diffrax.RecursiveCheckpointAdjoint())
    h = 1e-5
    value = lambda r: last(r, diffrax.RecursiveCheckpointAdjoint())
    truth = (value(rate + h) - value(rate - h)) / (2 * h)
    np.testing.assert_allclose(reverse, truth, rtol=1e-7)
    ahead = lambda r: last(r, diffrax.ForwardMode(), "lax")
    forward = jax.jvp(ahead, (rate,), (jnp.ones(()),))[1]
    np.testing.assert_allclose(forward, truth, rtol=1e-7)


def test_lanes_are_as_they_would_be_alone():
    """With other step sizes, and so other stages, beside them."""

    def last(rate):
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: args * (y - jnp.cos(t))),
            rj.RKC(radius=60.0),
            *(0.0, 3.0, 0.1, jnp.array(1.0), rate),
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
        )
        return solved.ys[0]

    rates = jnp.array([-1.0, -50.0])
    together = jax.vmap(last)(rates)
    np.testing.assert_allclose(together, [last(r) for r in rates], rtol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"radius": 0.0}, "radius must be positive, got 0.0"),
        ({"radius": -1.0}, "radius must be positive"),
        ({"most": 1}, "most must be at least 2, got 1"),
        ({"stages": 1}, "stages must be at least 2, got 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        rj.RKC(**options)
