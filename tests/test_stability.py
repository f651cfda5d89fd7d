"""Stability thresholds against closed forms, real runs and dense eigenvalues."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import rodjax as rj
from rodjax.optimizer import inverse_preconditioner, unit_preconditioner
from rodjax.optimizer._state import LATE

EPS = 1e-8
DECAY = 0.3


def bowl(params):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


# (eta, beta) -> an optimizer, and its threshold with a unit preconditioner.
EXACT = {
    "sgd": (lambda lr, b: optax.sgd(lr), lambda lr, b: 2 / lr),
    "heavy ball": (
        lambda lr, b: optax.sgd(lr, momentum=b),
        lambda lr, b: (2 + 2 * b) / lr,
    ),
    "nesterov": (
        lambda lr, b: optax.sgd(lr, momentum=b, nesterov=True),
        lambda lr, b: (2 + 2 * b) / ((1 + 2 * b) * lr),
    ),
    "averaged momentum": (
        lambda lr, b: optax.chain(optax.ema(b), optax.scale(-lr)),
        lambda lr, b: (2 / lr) * (1 + b) / (1 - b),
    ),
    # Two filters in a row: 2/eta over their gains at the alternating frequency. (Two
    # positive ones make a complex pair unstable before anything alternates.)
    "momentum twice": (
        lambda lr, b: optax.chain(optax.trace(b), optax.trace(-0.3), optax.scale(-lr)),
        lambda lr, b: (2 / lr) * (1 + b) * 0.7,
    ),
    "decayed gradient": (
        lambda lr, b: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr, b)),
        lambda lr, b: (2 + 2 * b) / lr - DECAY,
    ),
    "schedule": (
        lambda lr, b: optax.sgd(optax.linear_schedule(5 * lr, lr, 100)),
        lambda lr, b: 2 / lr,
    ),
}


def adam(lr, b):
    return (2 / lr) * (1 + b) / (1 - b)


def nadam(lr, b):
    return (2 / lr) * (1 + b) / ((1 - b) * (1 + 2 * b))


# The last entry is sqrt(nu) + eps at nu = 1 as the optimizer has it.
ADAPTIVE = {
    "rmsprop": (
        lambda lr, b: optax.rmsprop(lr),
        lambda lr, b: 2 / lr,
        (1 + EPS) ** 0.5,
    ),
    "rmsprop momentum": (
        lambda lr, b: optax.rmsprop(lr, momentum=b, eps_in_sqrt=False),
        lambda lr, b: (2 + 2 * b) / lr,
        1 + EPS,
    ),
    "rmsprop centered": (
        lambda lr, b: optax.rmsprop(lr, centered=True),
        lambda lr, b: 2 / lr,
        (1 + EPS) ** 0.5,
    ),
    "adagrad": (
        lambda lr, b: optax.adagrad(lr),
        lambda lr, b: 2 / lr,
        (1 + 1e-7) ** 0.5,
    ),
    "adam": (lambda lr, b: optax.adam(lr, b1=b), adam, 1 + EPS),
    "nadam": (lambda lr, b: optax.nadam(lr, b1=b), nadam, 1 + EPS),
    "amsgrad": (lambda lr, b: optax.amsgrad(lr, b1=b), adam, 1 + EPS),
    "radam": (lambda lr, b: optax.radam(lr, b1=b), adam, 1 + EPS),
    "yogi": (lambda lr, b: optax.yogi(lr, b1=b), adam, 1 + 1e-3),
    "clipped adam": (
        lambda lr, b: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr, b)),
        adam,
        1 + EPS,
    ),
    "scalar rmsprop": (
        lambda lr, b: rj.transforms.scalar_rmsprop(lr),
        lambda lr, b: 2 / lr,
        (1 + EPS) ** 0.5,
    ),
    "scalar adam": (
        lambda lr, b: rj.transforms.scalar_adam(lr, b1=b),
        adam,
        1 + EPS,
    ),
    "scalar nadam": (
        lambda lr, b: rj.transforms.scalar_nadam(lr, b1=b),
        nadam,
        1 + EPS,
    ),
}
HYPERPARAMETERS = [(0.1, 0.9), (0.02, 0.5), (1.5, 0.0)]
PARAMS = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5)}


# The papers' nine.
QUICK = {"sgd", "heavy ball", "nesterov", "rmsprop", "adam", "nadam", "scalar adam"}


@pytest.mark.parametrize(
    "name",
    [
        n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
        for n in EXACT | ADAPTIVE
    ],
)
def test_threshold_in_closed_form(name):
    make, truth, *edge = (EXACT | ADAPTIVE)[name]
    preconditioner = edge[0] if edge else 1.0
    # As data, which compiles once.
    dynamics = rj.dynamics(lambda h: make(h["lr"], h["b"]), bowl)
    for lr, b in HYPERPARAMETERS:
        value = rj.threshold(dynamics, PARAMS, lr={"lr": lr, "b": b})
        # Optax reads integer counts in single precision.
        rtol = 1e-7 if name == "schedule" else 1e-12
        np.testing.assert_allclose(value, truth(lr, b) * preconditioner, rtol=rtol)


@pytest.mark.parametrize(("lr", "b"), HYPERPARAMETERS)
def test_decoupled_weight_decay_lowers_the_threshold(lr, b):
    # -1 is a root of (mu - 1 + eta d)(mu - b) + mu eta (1 - b) l / P at this l.
    optimizer = optax.adamw(lr, b1=b, weight_decay=DECAY)
    value = rj.threshold(rj.dynamics(optimizer, bowl), PARAMS)
    truth = (2 / lr - DECAY) * (1 + b) / (1 - b) * (1 + EPS)
    np.testing.assert_allclose(value, truth, rtol=1e-12)


@pytest.mark.parametrize("name", [n for n in EXACT if n != "schedule"])
@pytest.mark.parametrize(("lr", "b"), HYPERPARAMETERS[:2])
def test_a_run_decays_below_the_threshold_and_alternates_above(name, lr, b):
    optimizer = EXACT[name][0](lr, b)
    edge = rj.threshold(rj.dynamics(optimizer, bowl), jnp.ones(()))

    @jax.vmap
    def run(ratio):
        def step(carry, _):
            w, state = carry
            updates, state = optimizer.update(ratio * edge * w, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        start = jnp.ones(())
        return jax.lax.scan(step, (start, optimizer.init(start)), length=3000)[1]

    below, above = jax.jit(run)(jnp.array([0.99, 1.01]))
    assert float(jnp.abs(below[-50:]).max()) < 1e-3
    assert float(jnp.abs(above[-1])) > 10 * float(jnp.abs(above[1500])) > 1
    assert bool(jnp.all(above[-50:-1] * above[-49:] < 0))


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(o(0.1), marks=pytest.mark.slow)
        for o in (optax.sign_sgd, optax.lion)
    ],
)
def test_threshold_is_infinite_where_curvature_has_no_effect(optimizer):
    dynamics = rj.dynamics(optimizer, bowl)
    assert float(rj.threshold(dynamics, PARAMS)) == np.inf
    assert float(rj.sharpness_ratio(dynamics, dynamics.init(PARAMS)).value) == 0.0


def test_threshold_with_hyperparameters_in_the_state():
    optimizer = optax.inject_hyperparams(optax.sgd)(0.1)
    value = rj.threshold(rj.dynamics(optimizer, bowl), PARAMS)
    np.testing.assert_allclose(value, 20.0, rtol=1e-12)


def test_threshold_for_many_learning_rates_at_once():
    dynamics = rj.dynamics(optax.adam, bowl)
    rates = jnp.array([0.01, 0.1, 1.0])
    every = jax.vmap(lambda lr: rj.threshold(dynamics, PARAMS, lr=lr))
    values = jax.jit(every)(rates)
    np.testing.assert_allclose(values, adam(rates, 0.9) * (1 + EPS), rtol=1e-12)


def test_threshold_in_single_precision():
    params = optax.tree.cast(PARAMS, jnp.float32)
    dynamics = rj.dynamics(optax.adam(0.1), bowl)
    value = jax.jit(lambda params: rj.threshold(dynamics, params))(params)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, adam(0.1, 0.9), rtol=1e-4)


def test_a_slow_average_is_no_oscillation_in_single_precision():
    """Beside a filter of 10,000 steps, whose eigenvalue is next to the one at rest."""
    dynamics = rj.dynamics(optax.contrib.ademamix(0.1), bowl)
    params = optax.tree.cast(PARAMS, jnp.float32)
    value, truth = (rj.threshold(dynamics, p) for p in (params, PARAMS))
    np.testing.assert_allclose(value, truth, rtol=1e-3)


NU = {"w": jnp.array([[0.25, 4.0]]), "b": jnp.array(1e-4)}


@pytest.mark.parametrize("count", [0, 5, LATE])
def test_adam_coordinate_thresholds_at_a_given_second_moment(count):
    lr, b1, b2 = 0.1, 0.8, 0.99
    dynamics = rj.dynamics(optax.adam(lr, b1, b2), bowl)
    state = dynamics.init(PARAMS)
    slow = jax.tree.unflatten(jax.tree.structure(state.slow), jax.tree.leaves(NU))
    state = state._replace(slow=slow, clock=optax.tree.full_like(state.clock, count))
    # Adam corrects for the biases after it has counted the step.
    first, second = 1 - b1 ** (count + 1), 1 - b2 ** (count + 1)
    for name, edge in rj.coordinate_thresholds(dynamics, state).items():
        truth = adam(lr, b1) * first * (jnp.sqrt(NU[name] / second) + EPS)
        np.testing.assert_allclose(edge, truth, rtol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "edge"),
    [
        (rj.transforms.scalar_adam(0.1), adam(0.1, 0.9) * (0.5 + EPS)),
        (rj.transforms.scalar_rmsprop(0.1), 20.0 * (0.25 + EPS) ** 0.5),
    ],
    ids=["adam", "rmsprop"],
)
def test_scalar_second_moment_gives_every_coordinate_the_same_threshold(
    optimizer, edge
):
    dynamics = rj.dynamics(optimizer, bowl)
    state = unit_preconditioner(dynamics, dynamics.init(PARAMS))
    state = state._replace(slow=optax.tree.full_like(state.slow, 0.25))
    for value in jax.tree.leaves(rj.coordinate_thresholds(dynamics, state)):
        np.testing.assert_allclose(value, edge, rtol=1e-9)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.5), optax.adam(0.01), optax.rmsprop(0.01)],
    ids=["heavy ball", "adam", "rmsprop"],
)
def test_sharpness_ratio_is_the_generalized_eigenvalue(optimizer):
    mix = jax.random.normal(jax.random.key(1), (8, 5))
    loss = lambda w: jnp.sum(jnp.tanh(mix @ w - 0.5) ** 2)
    dynamics = rj.dynamics(optimizer, loss)
    start = 0.3 * jax.random.normal(jax.random.key(2), (5,))

    @jax.jit
    def look(start):
        state = dynamics.init(start)
        state = jax.lax.fori_loop(0, 4, lambda _, z: dynamics.update(z), state)
        edges = rj.coordinate_thresholds(dynamics, state)
        hessian = jax.hessian(loss)(state.params)
        return edges, hessian, rj.sharpness_ratio(dynamics, state)

    edges, hessian, pair = look(start)
    truth = scipy.linalg.eigh(np.asarray(hessian), np.diag(edges), eigvals_only=True)
    np.testing.assert_allclose(pair.value, truth[-1], rtol=1e-10)
    # The eigenvector, taken to the parameters, solves H v = ratio D v.
    v = pair.vector / jnp.sqrt(edges)
    np.testing.assert_allclose(hessian @ v, pair.value * edges * v, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "optimizer", [optax.rmsprop, partial(optax.rmsprop, eps_in_sqrt=False)]
)
def test_preconditioner_has_derivatives_where_there_is_no_gradient(optimizer, dtype):
    """As of a pixel that is always zero, whose second moment stays at zero."""
    dynamics = rj.dynamics(optimizer(0.01), lambda w: 0.5 * w[0] ** 2)
    state = rj.warm_up(dynamics, jnp.ones(2, dtype), 3).at(0)
    inverse = lambda slow: inverse_preconditioner(dynamics, state._replace(slow=slow))
    along = jax.jit(lambda s: jax.jvp(inverse, (s,), (optax.tree.scale(0.1, s),)))
    value, rate = along(state.slow)
    assert jnp.isfinite(value).all() and jnp.isfinite(rate).all()
    assert float(rate[1]) == 0.0
    # P goes as the root of the second moment, but for Optax's epsilon.
    np.testing.assert_allclose(rate[0], -0.05 * value[0], rtol=1e-4)
