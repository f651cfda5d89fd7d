"""Orders of convergence, by regression: in the learning rate, and in the solver."""

from functools import lru_cache, partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import apart, heun, order

import rodjax as rj
from rodjax.flows import edge, igr, modulated, rod, stable

FLOWS = {
    "stable": stable,
    "modulated": modulated,
    "modulated plain": partial(modulated, degree=1),
    "modulated cubic": partial(modulated, degree=3),
    "rod": rod,
    "rod plain": partial(rod, order=1),
    "bundle": partial(rod, rank=2),
    "edge": edge,
    "igr": igr,
}
ORDERS = {
    "stable": 1,
    "modulated": 2,
    "modulated plain": 1,
    "modulated cubic": 2,
    "rod": 2,
    "rod plain": 1,
    "bundle": 2,
    "edge": 1,
    "igr": 2,
}
# Steps at these learning rates, all for a time lr * steps = 0.4.
RATES = {0.02: 20, 0.01: 40, 0.005: 80}
START = jnp.array([0.9, -0.5, 0.4])
KEY = jax.random.key(0)


def loss(w):
    """Smooth and not quadratic; its sharpness of about 4 is far below 2 / lr."""
    return (
        jnp.sum(jnp.array([1.0, 0.5, 0.25]) * w**2) + jnp.cosh(w[0] - w[1]) + w[2] ** 4
    )


SGD = rj.dynamics(optax.sgd, loss)


@lru_cache
def flow_of(name):
    return FLOWS[name](SGD)


@lru_cache
def windows(lr):
    """Of the run, where the flows begin and where they end."""
    begin = rj.warm_up(SGD, START, steps=RATES[lr] // 5, lr=lr)
    return begin, rj.warm_up(SGD, begin, steps=RATES[lr], lr=lr)


@lru_cache
def solved(name):
    """(window, lr, steps) -> the centre after so many steps from there."""
    flow = flow_of(name)
    solve = heun(flow, substeps=8)

    @jax.jit
    def centre(begin, lr, steps):
        y = flow.init(begin, lr=lr, key=KEY)
        return flow.centre(solve(y, lr, 8 * steps)).params

    return centre


@lru_cache
def error(name, lr):
    """At the end, of the centre against the midpoint of the run that it models."""
    begin, end = windows(lr)
    middle = rj.half_step_midpoint if flow_of(name).offset else rj.midpoint
    return apart(solved(name)(begin, lr, RATES[lr]), middle(end).params)


@pytest.mark.parametrize("name", FLOWS)
def test_order_in_the_learning_rate(name):
    errors = [error(name, lr) for lr in RATES]
    assert abs(order(list(RATES), errors) - ORDERS[name]) < 0.2, errors


@pytest.mark.parametrize("name", ["modulated", "rod"])
def test_correction_pays(name):
    assert error(name, 0.01) < 0.05 * error(f"{name} plain", 0.01)


@pytest.mark.parametrize(
    "solver, exponent",
    [
        pytest.param(diffrax.Euler(), 1, id="Euler", marks=pytest.mark.slow),
        pytest.param(diffrax.Heun(), 2, id="Heun"),
    ],
)
@pytest.mark.parametrize(
    "name", ["stable", "modulated", pytest.param("rod", marks=pytest.mark.slow)]
)
def test_order_of_the_field_in_diffrax(name, solver, exponent):
    """Two steps of a large learning rate; the size of a substep is data."""
    flow, lr = flow_of(name), jnp.asarray(0.2)
    begin = rj.warm_up(SGD, START, steps=3, lr=lr)

    @jax.jit
    def end(substeps):
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(flow.vector_field),
            solver,
            0.0,
            2.0,
            1.0 / substeps,
            flow.init(begin, lr=lr, key=KEY),
            args=lr,
            max_steps=2**13,
        )
        return jax.tree.map(lambda y: y[-1], solved.ys)

    grid = (32, 64, 128)
    exact = end(2048.0)
    errors = [apart(end(float(n)), exact) for n in grid]
    assert abs(order(grid, errors) + exponent) < 0.2, errors


@lru_cache
def end(name, solver, substeps, controller=None):
    """The state of a flow after two steps of a large learning rate."""
    begin = rj.warm_up(SGD, START, steps=3, lr=0.2)
    options = {"solver": solver, "substeps": substeps}
    options["stepsize_controller"] = controller
    path = rj.integrate(flow_of(name), begin, steps=2, every=2, lr=0.2, **options)
    return jax.tree.map(np.asarray, path.final.state)


def test_order_of_the_solver():
    exact, grid = end("stable", diffrax.Dopri8(), 16), (16, 32, 64)
    errors = [apart(end("stable", diffrax.Heun(), n), exact) for n in grid]
    assert abs(order(grid, errors) + 2) < 0.2, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable", "modulated", "rod"])
def test_adaptive_agrees_with_fixed_steps(name):
    exact = end(name, diffrax.Dopri8(), 16)
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-12)
    assert apart(end(name, diffrax.Tsit5(), 4, controller), exact) < 1e-7
