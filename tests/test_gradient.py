"""Gradient flow and its corrections: orders, closed forms, schedules and cost."""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import order, runge_kutta

import rodjax as rj
from rodjax.flows import gradient, igr, stable, third_order

FLOWS = {"gradient": gradient, "igr": igr, "third_order": third_order}
KEY = jax.random.key(0)
START = {"a": jnp.array([0.9, -0.5, 0.4]), "b": jnp.array(0.7)}


def loss(params):
    """Smooth, coupled, and of a third derivative that counts."""
    a, b = params["a"], params["b"]
    curvature = jnp.array([2.0, 1.0, 0.5], a.dtype)
    return 0.5 * a @ (curvature * a) + jnp.cosh(jnp.sum(a) - b) + a[2] ** 4 + b**3


SGD = rj.dynamics(optax.sgd, loss)


@lru_cache
def flow_of(name):
    return FLOWS[name](SGD)


@lru_cache
def local_errors(name):
    """After one step from the start, of the flow against gradient descent."""
    rates = jnp.array([0.002, 0.004, 0.008, 0.016])
    once = jax.jit(
        jax.vmap(
            lambda lr: runge_kutta(flow_of(name), START, 1, lr=lr, substeps=8).params
        )
    )
    ends = jax.tree.map(lambda x: x[:, 0], once(rates))
    slope = jax.grad(loss)(START)
    apart = jax.tree.map(
        lambda end, w, g: end - (w[None] - jnp.tensordot(rates, g, 0)),
        ends,
        START,
        slope,
    )
    return rates, jax.vmap(optax.tree.norm)(apart)


@pytest.mark.parametrize("name, power", list(zip(FLOWS, (2, 3, 4), strict=True)))
def test_order_of_a_step(name, power):
    rates, errors = local_errors(name)
    assert abs(order(rates, errors) - power) < 0.15, errors


def test_leading_term_of_a_step():
    """Of gradient flow: eta^2 H g / 2; of IGR: eta^3 (H^2 g / 3 + T[g, g] / 12)."""
    g = jax.grad(loss)(START)
    once = rj.hvp(loss, START, g)
    twice, bent = rj.hvp(loss, START, once), rj.third_derivative(loss, START, g, g)
    third = jax.tree.map(lambda h, t: h / 3 + t / 12, twice, bent)
    for name, power, term in [
        ("gradient", 2, optax.tree.scale(0.5, once)),
        ("igr", 3, third),
    ]:
        rates, errors = local_errors(name)
        leading = float(optax.tree.norm(term)) * float(rates[0]) ** power
        np.testing.assert_allclose(errors[0], leading, rtol=0.05)


SPECTRUM = np.array([3.0, 1.0, 0.0, -0.5])
BOWL = rj.dynamics(optax.sgd, rj.problems.quadratic(SPECTRUM).loss)
EXPONENTS = {
    "gradient": lambda x: x,
    "igr": lambda x: x + x**2 / 2,
    "third_order": lambda x: x + x**2 / 2 + x**3 / 3,
}


@pytest.mark.parametrize("name", FLOWS)
def test_quadratic_in_closed_form(name):
    """w_i(t) = exp(-t p(eta l_i)), p the first terms of -log(1 - x)."""
    flow, start = FLOWS[name](BOWL), {"w": jnp.ones(4)}
    rates = jnp.array([0.1, 0.3, 0.8])
    solve = lambda lr: runge_kutta(flow, start, 5, lr=lr, substeps=128).params["w"]
    paths = jax.jit(jax.vmap(solve))(rates)
    for lr, path in zip(rates, paths, strict=True):
        exponent = EXPONENTS[name](float(lr) * SPECTRUM)
        exact = np.exp(-np.outer(np.arange(1, 6), exponent))
        np.testing.assert_allclose(path, exact, rtol=2e-5)
    # At eta l = 2.4, where gradient descent diverges, the minimum still attracts.
    assert np.all(np.diff(paths[2, :, 0]) < 0)


def test_gradient_is_the_stable_flow():
    for optimizer in (optax.sgd(0.1), optax.sgd(optax.linear_schedule(0.2, 0.0, 5))):
        dynamics = rj.dynamics(optimizer, loss)
        y = gradient(dynamics).init(START, lr=None, key=KEY)
        chex.assert_trees_all_equal(y, stable(dynamics).init(START, lr=None, key=KEY))
        y = y._replace(clock=optax.tree.full_like(y.clock, 2.3))
        fields = (f(dynamics).vector_field(0.0, y, None) for f in (gradient, stable))
        chex.assert_trees_all_equal(*fields)


@pytest.mark.parametrize("name", FLOWS)
def test_a_schedule_is_followed(name):
    """On a quadratic each step's rate counts, to the order of the flow in eta l."""
    rates = optax.linear_schedule(0.0, 0.08, 8)
    loss = lambda w: 0.5 * jnp.sum(w**2)
    flow = FLOWS[name](rj.dynamics(optax.sgd(rates), loss))
    path = jax.jit(lambda: runge_kutta(flow, jnp.ones(1), 16, lr=None).params)()[:, 0]
    each = np.array([float(rates(t)) for t in range(16)])
    modelled = np.exp(-np.cumsum(EXPONENTS[name](each)))
    # Gradient flow reads the schedule where it stands, the others half a step before.
    off = 0.5 * (each[-1] - each[0]) if name == "gradient" else 0.0
    np.testing.assert_allclose(path[-1], modelled[-1] * np.exp(-off), rtol=2e-3)
    run = np.prod(1 - each)
    limit = {"gradient": 0.1, "igr": 5e-3, "third_order": 2e-3}[name]
    assert abs(path[-1] / run - 1) < limit


@pytest.mark.parametrize(
    "build",
    [
        partial(optax.sgd, momentum=0.9),
        partial(optax.sgd, momentum=0.9, nesterov=True),
        optax.adam,
        optax.rmsprop,
        optax.sign_sgd,
        lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
        lambda lr: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr)),
        lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
        lambda lr: optax.chain(optax.scale_by_sign(), optax.sgd(lr)),
    ],
)
def test_refuses_other_optimizers(build):
    flow = third_order(rj.dynamics(build, loss))
    message = r"third_order models gradient descent only.*rod, modulated or edge"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(flow.init, lr=jnp.asarray(0.1), key=KEY), START)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(
    "build",
    [
        lambda lr: optax.chain(optax.scale(0.5), optax.sgd(lr)),
        lambda lr: optax.sgd(optax.exponential_decay(0.1, 10, 0.5)),
        lambda lr: optax.inject_hyperparams(optax.sgd)(0.1),
    ],
)
def test_serves_gradient_descent_in_disguise(name, build):
    flow = FLOWS[name](rj.dynamics(build, loss))
    y = flow.init(START, lr=jnp.asarray(0.1), key=KEY)
    field = flow.vector_field(0.0, y, jnp.asarray(0.1))
    plain = flow_of(name)
    rate = 0.05 if "scale" in build.__code__.co_names else 0.1
    y = plain.init(START, lr=jnp.asarray(rate), key=KEY)
    truth = plain.vector_field(0.0, y, jnp.asarray(rate))
    chex.assert_trees_all_close(field.params, truth.params, rtol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_starts_at_the_midpoint_of_a_window(name):
    window = rj.warm_up(SGD, START, steps=5, lr=0.05)
    flow = flow_of(name)
    begin = flow.centre(flow.init(window, lr=jnp.asarray(0.05), key=KEY)).params
    chex.assert_trees_all_equal(begin, rj.midpoint(window).params)
