"""Orders of convergence, by regression: in the learning rate, and in the solver."""

from functools import lru_cache, partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import _edge as edge, _modulated as modulated, _rod as rod, _stable as stable, igr

FLOWS = {
    "stable": stable,
    "modulated": modulated,
    "modulated plain": partial(modulated, bea=False),
    "rod": rod,
    "rod plain": partial(rod, bea=False),
    "bundle": partial(rod, rank=2),
    "edge": edge,
    "igr": igr,
}
ORDERS = {
    "stable": 1,
    "modulated": 2,
    "modulated plain": 1,
    "rod": 2,
    "rod plain": 1,
    "bundle": 2,
    "edge": 1,
    "igr": 2,
}
# Steps at these learning rates, all for a time lr * steps = 0.4.
RATES = {0.02: 20, 0.01: 40, 0.005: 80}
START = jnp.array([0.9, -0.5, 0.4])


def loss(w):
    """Smooth and not quadratic; its sharpness of about 4 is far below 2 / lr."""
    return (
        jnp.sum(jnp.array([1.0, 0.5, 0.25]) * w**2) + jnp.cosh(w[0] - w[1]) + w[2] ** 4
    )


SGD = rj.dynamics(optax.sgd, loss)


@lru_cache
def flow_of(name):
    return FLOWS[name](SGD)


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


@lru_cache
def error(name, lr):
    """At the end, of the centre against the midpoint of the run that it models."""
    flow, steps = flow_of(name), RATES[lr]
    begin = rj.warm_up(SGD, START, steps=steps // 5, lr=lr)
    options = {"steps": steps, "every": steps, "lr": lr}
    path = rj.integrate(flow, begin, substeps=8, **options)
    window = rj.descend(SGD, begin, **options).final
    middle = rj.half_step_midpoint if flow.offset else rj.midpoint
    assert float(path.steps[-1]) == float(window.step) + flow.offset
    return float(jnp.linalg.norm(path.params[-1] - middle(window).params))


@pytest.mark.parametrize("name", FLOWS)
def test_order_in_the_learning_rate(name):
    errors = [error(name, lr) for lr in RATES]
    assert abs(slope(list(RATES), errors) - ORDERS[name]) < 0.2, errors


@pytest.mark.parametrize("name", ["modulated", "rod"])
def test_correction_pays(name):
    assert error(name, 0.01) < 0.05 * error(f"{name} plain", 0.01)


@lru_cache
def end(name, solver, substeps, controller=None):
    """The state of a flow after two steps of a large learning rate."""
    begin = rj.warm_up(SGD, START, steps=3, lr=0.2)
    options = {"solver": solver, "substeps": substeps, "controller": controller}
    path = rj.integrate(flow_of(name), begin, steps=2, every=2, lr=0.2, **options)
    return jax.tree.map(np.asarray, path.final)


def gap(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


@pytest.mark.parametrize(
    "solver, grid, order",
    [
        pytest.param(
            diffrax.Euler(), (32, 64, 128), 1, id="Euler", marks=pytest.mark.slow
        ),
        pytest.param(diffrax.Heun(), (16, 32, 64), 2, id="Heun"),
    ],
)
@pytest.mark.parametrize("name", ["stable", "modulated", "rod"])
def test_order_of_the_solver(name, solver, grid, order):
    exact = end(name, diffrax.Dopri8(), 16)
    errors = [gap(end(name, solver, n), exact) for n in grid]
    assert abs(slope(grid, errors) + order) < 0.2, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable", "modulated", "rod"])
def test_adaptive_agrees_with_fixed_steps(name):
    exact = end(name, diffrax.Dopri8(), 16)
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-12)
    assert gap(end(name, diffrax.Tsit5(), 4, controller), exact) < 1e-7
