"""Parameters, losses, learning rates and starts of every kind: right, or refused."""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import rodjax as rj

slowly = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
EULER = {"solver": diffrax.Euler(), "substeps": 1}


def bowl(params):
    """Each leaf towards one, so that none is anything like zero."""
    leaves = jax.tree.leaves(params)
    return 0.5 * sum(jnp.sum((x - 1.0) ** 2).astype(float) for x in leaves)


class Moments(NamedTuple):
    """Named as Optax's own fields are."""

    nu: jax.Array
    mu: jax.Array
    trace: jax.Array


@jax.tree_util.register_dataclass
@dataclass
class Weights:
    count: jax.Array


ONE = jnp.full(2, 3.0)
TREES = {
    "named like moments": Moments(ONE, 2 * ONE, jnp.array(5.0)),
    "data class": Weights(ONE),
    "frozen": FrozenDict({"a": ONE}),
    "scalar": jnp.array(3.0),
    "python numbers": {"a": 3.0, "b": 2.0},
    "absent": {"a": ONE, "static": None},
    "empty tuple": (ONE, ()),
    "no entries": {"a": ONE, "none": jnp.zeros((0, 3))},
    "several dtypes": {
        "a": ONE.astype(jnp.float32),
        "b": ONE,
        "c": ONE.astype(jnp.bfloat16),
    },
    "half precision": ONE.astype(jnp.bfloat16),
}
QUICK = ("no entries",)


@pytest.mark.parametrize("name", [n if n in QUICK else slowly(n) for n in TREES])
def test_any_tree_of_parameters(name):
    """The optimizer, its threshold and ratio, and two flows, against closed forms."""
    params = TREES[name]
    half = jnp.bfloat16 in [jnp.result_type(x) for x in jax.tree.leaves(params)]
    near = {"rtol": 0.05 if half else 1e-6}
    adam = rj.dynamics(optax.adam(0.1), bowl)
    np.testing.assert_allclose(rj.threshold(adam, params), 380.0, **near)
    run = rj.descend(adam, params, 3, metrics=[rj.edge_of_stability(adam)])
    assert np.isfinite(run.metrics["sharpness_ratio"]).all()
    assert jax.tree.structure(run.params) == jax.tree.structure(params)
    for dynamics in (rj.dynamics(optax.sgd(0.1), bowl), adam):
        for flow in (rj.flows.modulated(dynamics), rj.flows.edge(dynamics)):
            path = rj.integrate(flow, params, 3)
            assert np.isinf(path.diverged_at)
            for x, w in zip(*map(jax.tree.leaves, (path.params, params)), strict=True):
                assert x.dtype == jnp.promote_types(jnp.result_type(w), jnp.float32)
                if dynamics is not adam and x.size:
                    # Towards one: what the edge flow is without an edge, the limit.
                    kept = np.exp(-0.3) if flow.evaluations == 2 else 0.9**3
                    truth = 1 + (np.asarray(w, float) - 1) * kept
                    np.testing.assert_allclose(
                        np.asarray(x[-1], float), truth, rtol=0.03 if half else 2e-3
                    )


# --- losses --------------------------------------------------------------------------


@jax.custom_vjp
def outside(x):
    """As a simulator is: values and gradients by callbacks, one point at a time."""
    result = jax.ShapeDtypeStruct((), x.dtype)
    return jax.pure_callback(lambda x: 0.5 * np.sum(np.asarray(x) ** 2), result, x)


def gradient_outside(x, g):
    return (g * jax.pure_callback(np.asarray, x, x),)


outside.defvjp(lambda x: (outside(x), x), gradient_outside)


def test_a_loss_by_callbacks_runs_and_flows_by_first_derivatives():
    sgd = rj.dynamics(optax.sgd(0.1), outside)
    run = rj.descend(sgd, ONE, 4)
    times = np.arange(5.0)
    np.testing.assert_allclose(run.ends[:, 0, 0], 3.0 * 0.9**times)
    mean = 0.5 * (1 + 0.9**2) * 9.0 * 0.9 ** (2 * times)
    np.testing.assert_allclose(run.metrics["mean_loss"], mean)
    path = rj.integrate(rj.flows.stable(sgd), ONE, 4, **EULER)
    np.testing.assert_allclose(path.params[:, 0], 3.0 * 0.9 ** np.arange(5.0))
    for name in ("edge", "igr", "central"):
        with pytest.raises(TypeError, match="no second derivatives, which this flow"):
            rj.integrate(getattr(rj.flows, name)(sgd), ONE, 2)


# --- learning rates, steps and starts ------------------------------------------------


@pytest.mark.parametrize("lr", [0.0, -0.1, 1e300, np.inf, np.nan])
def test_any_learning_rate_ends_in_numbers_or_in_diverged_at(lr):
    sgd = rj.dynamics(optax.sgd, bowl)
    run = rj.descend(sgd, ONE, 5, lr=lr)
    path = rj.integrate(rj.flows.stable(sgd), ONE, 5, lr=lr)
    for found, early in ((run, 3), (path, 0)):
        # Of a run a window that reaches three steps ahead is lost with them, unless it
        # is the first.
        first = 0 if np.isnan(lr) else 1
        lost = np.arange(6.0) >= np.maximum(found.diverged_at - early, first)
        assert np.array_equal(np.isnan(found.metrics["loss"]), lost)
        assert np.isfinite(found.diverged_at) == (not abs(lr) < 1)


def test_a_healthy_run_is_told_without_a_nan():
    """For those who let JAX stop at the first one."""
    adam = rj.dynamics(optax.adam(0.1), bowl)
    with jax.debug_nans(True):
        run = rj.descend(adam, ONE, 4, metrics=[rj.edge_of_stability(adam)])
        path = rj.integrate(rj.flows.modulated(adam), run.final, 4)
    chex.assert_tree_all_finite((run.params, path.params))


def test_a_covariance_leaves_from_parameters_at_zero():
    """Berthier's valley, moved so that its start is the origin."""
    valley = rj.problems.berthier(initial=(0.1, 6.5))
    moved = lambda w: valley.loss(optax.tree.add(w, valley.params))
    sgd = rj.dynamics(optax.sgd(0.3), moved)
    zero = optax.tree.zeros_like(valley.params)
    run = rj.descend(sgd, zero, 2000, every=100)
    path = rj.integrate(rj.flows.covariance(sgd), zero, 2000, every=100)
    # Half of what it missed by when it never left.
    y = lambda path: path.params["y"][-5:].mean()
    assert abs(y(path) - y(run)) < 0.1
    assert float(path.metrics["amplitude"].max()) > 1e-2


@pytest.mark.slow
def test_a_central_flow_started_above_the_edge_says_that_it_left():
    """Logistic regression, whose sharpness is highest at the start, from zeros."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(40, 4)))
    y = jnp.sign(x @ jnp.arange(1.0, 5.0) + jnp.asarray(rng.normal(size=40)))
    loss = lambda w: jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))
    zero = jnp.zeros(4)
    lr = 2.4 / float(jnp.linalg.eigvalsh(jax.hessian(loss)(zero))[-1])
    sgd = rj.dynamics(optax.sgd(lr), loss)
    assert np.isinf(rj.descend(sgd, zero, 60).diverged_at)
    path = rj.integrate(rj.flows.central(sgd), zero, 60)
    held = path.metrics["complementarity"]
    assert np.isfinite(path.diverged_at) or np.nanmax(held) > 1e-2


def test_a_count_beyond_single_precision_goes_on():
    """Of 2^24 steps, after which a float32 does not count any more."""
    adam = rj.dynamics(optax.adam(0.1), bowl)
    start = ONE.astype(jnp.float32)
    window = rj.warm_up(adam, start, 1)
    late = lambda x: x + 2**24 if x.dtype == jnp.int32 else x
    states = window.states._replace(clock=jax.tree.map(late, window.states.clock))
    final = rj.descend(adam, window._replace(states=states), 3).final
    counts = jax.tree.leaves(final.states.clock)[0]
    assert counts.tolist() == [2**24 + 1 + k for k in range(7)]
