"""The linear map of an optimizer, and the angle at which it leaves the unit circle."""

import warnings
from functools import partial

import cli_runner
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import OPTIMIZERS

import rodjax as rj
from rodjax.cli import _names as choices
from rodjax.optimizer import (
    alternating_multiplier,
    first_edge,
    has_momentum,
    linearize,
)

PARAMS = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5)}
# At the learning rate 0.1.
MOMENTUM = {
    "sgd": optax.sgd(0.1),
    "heavy ball": optax.sgd(0.1, momentum=0.9),
    "averaged momentum": optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "momentum twice": optax.chain(optax.trace(0.9), optax.trace(-0.3), optax.sgd(0.1)),
}


def bowl(params):
    return 0.5 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def test_linear_map_of_momentum():
    lr, b, curvature = 0.1, 0.9, 7.0
    dynamics = rj.dynamics(optax.sgd(lr, momentum=b), bowl)
    linear = linearize(dynamics, dynamics.init(PARAMS))
    # m' = b m + l w and w' = w - eta m'.
    truth = np.array([[1 - lr * curvature, -lr * b], [curvature, b]])
    maps = linear.at(optax.tree.full_like(PARAMS, curvature))
    for name, shape in {"w": (1, 2), "b": ()}.items():
        assert maps[name].shape == (*shape, 2, 2)
        np.testing.assert_allclose(
            maps[name], np.broadcast_to(truth, (*shape, 2, 2)), rtol=1e-14
        )


@pytest.mark.parametrize(
    ("name", "ratio", "modulus"),
    [
        ("sgd", 0.5, 0.0),
        ("sgd", 0.75, 0.5),
        ("sgd", 1.0, 1.0),
        ("heavy ball", 0.5, 0.9**0.5),
        ("heavy ball", 0.9, 0.9**0.5),
        ("heavy ball", 1.0, 1.0),
        pytest.param(*("averaged momentum", 0.5, 0.9**0.5), marks=pytest.mark.slow),
        ("momentum twice", 1.0, 1.0),
    ],
)
def test_alternating_multiplier(name, ratio, modulus):
    dynamics = rj.dynamics(MOMENTUM[name], bowl)
    state = dynamics.init(PARAMS)
    mu = alternating_multiplier(dynamics, state, ratio)
    np.testing.assert_allclose(jnp.abs(mu), modulus, atol=1e-12)
    if ratio == 1.0:
        np.testing.assert_allclose(mu, -1.0, atol=1e-12)


@pytest.mark.slow
def test_a_slot_that_forgets_at_once_is_not_what_alternates():
    """That of the last gradient, beside which momentum rings on."""
    adan = rj.dynamics(optax.adan(0.1, b1=0.9, b2=0.9, b3=0.9), bowl)
    mu = alternating_multiplier(adan, adan.init(PARAMS), 0.5)
    assert 0.8 < float(jnp.abs(mu)) < 1.0


@pytest.mark.slow
def test_what_is_gone_in_a_step_is_carried_no_faster_than_a_solver_can():
    heavy_ball = rj.dynamics(optax.sgd(0.1, momentum=1e-6), bowl)
    window = rj.warm_up(heavy_ball, PARAMS, 5)
    assert float(rj.ringing(heavy_ball, window).log_decay) == -2.0


def eigenvalues(name, curvature):
    """Of one step of two filters in a row on l/2 w^2, as Optax has them; by hand."""
    first, second = FILTERS[name]
    m = np.array([curvature, first, 0.0])
    v = m + np.array([0.0, 0.0, second])
    w = np.array([1.0, 0.0, 0.0]) - v
    return np.linalg.eigvals(np.stack([w, m, v]))


FILTERS = {
    "(0.5, 0.5)": (0.5, 0.5),
    "(0.4, 0.7)": (0.4, 0.7),
    "(0.7, 0.85)": (0.7, 0.85),
}


@pytest.mark.parametrize(
    "name",
    [
        "(0.7, 0.85)",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("(0.5, 0.5)", "(0.4, 0.7)")
        ),
    ],
)
def test_two_filters_in_a_row_lose_stability_at_another_angle(name):
    a, b = FILTERS[name]
    dynamics = rj.dynamics(
        optax.chain(optax.trace(a), optax.trace(b), optax.sgd(1.0)), bowl
    )
    edge = first_edge(dynamics, PARAMS)
    below, above = (
        eigenvalues(name, ratio * edge.curvature) for ratio in (0.999, 1.001)
    )
    assert np.abs(below).max() < 1 < np.abs(above).max()
    top = above[np.argmax(np.abs(above))]
    np.testing.assert_allclose(np.abs(np.angle(top)), edge.angle, rtol=1e-2)
    assert float(edge.angle) < 2.0
    # Published gains of filters of unit gain at rest (Lee, Lee, arXiv 2608.18415).
    known = {"(0.4, 0.7)": (2.571, 0.263), "(0.7, 0.85)": (0.681, 0.088)}
    if name in known:
        gain = edge.curvature / ((1 - a) * (1 - b))
        np.testing.assert_allclose((gain, edge.angle / np.pi), known[name], atol=6e-4)


@pytest.mark.parametrize("count", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_longer_chain_of_filters_by_its_own_eigenvalues(count):
    """Beyond three slots the angle is looked for on a grid."""
    filters = [optax.trace(b) for b in (0.3, 0.5, 0.6, 0.2)[:count]]
    dynamics = rj.dynamics(optax.chain(*filters, optax.sgd(1.0)), bowl)
    edge = first_edge(dynamics, PARAMS)
    linear = linearize(dynamics, dynamics.init(PARAMS))
    for ratio, stable in ((0.5, True), (0.999, True), (1.001, False)):
        at = linear.at(optax.tree.full_like(PARAMS, ratio * edge.curvature))
        radius = np.abs(np.linalg.eigvals(at["b"])).max()
        assert (radius < 1) == stable


def test_has_momentum():
    for name, optimizer in MOMENTUM.items():
        state = rj.dynamics(optimizer, bowl).init(PARAMS)
        assert has_momentum(state) is (name != "sgd")


# --- the angle without a program, and what flows say of it ----------------------------


def delayed(lr):
    """Gradient descent along the last step's gradient: unstable at 1/lr, period six."""
    return optax.GradientTransformation(
        optax.tree.zeros_like,
        lambda grads, last, _: (optax.tree.scale(-lr, last), grads),
    )


def twice(learning_rate, a=0.5):
    return optax.chain(optax.trace(a), optax.trace(0.5), optax.sgd(learning_rate))


OTHER = {
    "delayed": delayed,
    "twice": twice,
    "four": lambda lr: optax.chain(*[optax.trace(0.3)] * 4, optax.sgd(lr)),
}


@pytest.mark.parametrize(
    "name",
    ["delayed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("twice", "four"))],
)
def test_another_angle_is_seen_in_a_few_steps(name):
    dynamics = rj.dynamics(OTHER[name], bowl)
    truth = first_edge(dynamics, PARAMS, lr=0.05).angle
    assert float(truth) < 2.0
    np.testing.assert_allclose(dynamics.angle(PARAMS, lr=0.05), truth, rtol=1e-5)
    single = optax.tree.cast(PARAMS, jnp.float32)
    np.testing.assert_allclose(dynamics.angle(single, lr=0.05), truth, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_usual_optimizers_oscillate_with_period_two(name):
    dynamics = rj.dynamics(OPTIMIZERS[name], bowl)
    assert dynamics.angle(PARAMS, lr=0.05) == np.pi


def test_no_angle_is_told_where_hyperparameters_decide():
    dynamics = rj.dynamics(lambda h: twice(h["lr"], h["a"]), bowl)
    assert dynamics.angle(PARAMS, lr={"lr": 0.05, "a": 0.5}) is None
    assert rj.dynamics(optax.lamb, bowl).angle(PARAMS, lr=0.05) is None


FLOWS = {"modulated": rj.flows.modulated, "rod": rj.flows.rod, "edge": rj.flows.edge}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("optimizer", [delayed, twice])
def test_flows_of_period_two_warn_of_another(name, optimizer):
    """Even where the learning rate is traced, as in `integrate` and sweeps."""
    flow = FLOWS[name](rj.dynamics(optimizer, bowl))
    init = partial(flow.init, PARAMS, key=jax.random.key(0))
    rates = jnp.array([0.05, 0.1])
    words = f"oscillation of period 6 .* the {name} flow models only one of period two"
    with pytest.warns(rj.flows.PeriodWarning, match=words):
        jax.eval_shape(jax.vmap(lambda lr: init(lr=lr)), rates)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_have_nothing_to_warn_of_as_a_rule(name):
    flow = FLOWS[name](rj.dynamics(optax.adam, bowl))
    stable = rj.flows.stable(rj.dynamics(twice, bowl))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (flow, stable):
            init = partial(one.init, PARAMS, key=jax.random.key(0))
            jax.eval_shape(lambda lr, init=init: init(lr=lr), 0.05)


@pytest.mark.slow
def test_the_command_says_so_once(tmp_path, monkeypatch):
    """In its own words, and not in a warning, which is an error here."""
    choice = choices.OPTIMIZERS["nadam"]._replace(build=twice)
    monkeypatch.setitem(choices.OPTIMIZERS, "nadam", choice)
    result = cli_runner.invoke(
        "run", "--problem", "quadratic", "--lr", 0.1, "--warmup", 0, "--steps", 2,
        "--optimizer", "nadam", "--flows", "edge", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("oscillation of period 6") == 1
    assert "PeriodWarning" not in result.stderr
