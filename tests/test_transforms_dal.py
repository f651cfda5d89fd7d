"""DAL against its closed formula, and in the loops that it is meant for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.optimizer import merge
from rodjax.transforms import ScaleByDalState, dal, scale_by_dal
from rodjax.transforms._extra import loss_of_params

SPECTRUM = [4.0, 1.5, 0.3]


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


def step(tx, loss, params, **extra):
    @jax.jit
    def update(params):
        grad = jax.grad(loss)(params)
        return tx.update(grad, tx.init(params), params, value_fn=loss, **extra)

    return update(params)


def rate_of(state):
    return optax.tree.get(state, "learning_rate")


def formula(loss, params, p, max_lr):
    """The learning rate in numpy, from the Hessian as a matrix."""
    both = jax.jit(lambda w: (jax.grad(loss)(w), jax.hessian(loss)(w)))
    grad, hessian = both(params)
    ratio = np.linalg.norm(hessian @ grad) / np.linalg.norm(grad)
    return min(2 / ratio**p, max_lr)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("scale", "max_lr"), [(1.0, 5.0), (1.0, 0.4), (0.1, 5.0)])
def test_closed_formula_on_quadratics(p, scale, max_lr):
    problem = rj.problems.quadratic(scale * np.array(SPECTRUM), seed=3)
    loss, w = lambda v: problem.loss({"w": v}), problem.params["w"]
    expected = formula(loss, w, p, max_lr)
    updates, state = step(dal(p, max_lr), loss, w)
    np.testing.assert_allclose(rate_of(state), expected, rtol=1e-12)
    np.testing.assert_allclose(updates, -expected * jax.grad(loss)(w), rtol=1e-12)


def test_one_direction_meets_its_own_edge():
    loss = lambda w: jnp.sum(jnp.array(SPECTRUM) * w**2) / 2
    for axis, curvature in enumerate(SPECTRUM):
        _, state = step(dal(max_lr=100.0), loss, jnp.eye(3)[axis])
        np.testing.assert_allclose(rate_of(state), 2 / curvature, rtol=1e-12)


def test_nested_parameters_count_as_one_vector():
    tree = {"a": jnp.array([[1.0, -0.5]]), "b": [jnp.array(0.7)]}
    flat, _ = ravel_pytree(tree)
    loss = lambda v: jnp.sum(v**4) + jnp.prod(v)
    updates, state = step(dal(0.7), lambda t: loss(ravel_pytree(t)[0]), tree)
    rate = formula(loss, flat, 0.7, 5.0)
    np.testing.assert_allclose(rate_of(state), rate)
    np.testing.assert_allclose(ravel_pytree(updates)[0], -rate * jax.grad(loss)(flat))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_vanishing_gradient_and_curvature(p):
    cap = 3.0 if p else 2.0
    flat, still = lambda w: jnp.sum(2.0 * w), lambda w: jnp.sum(w**2)
    updates, state = step(dal(p, 3.0), flat, jnp.ones(2))
    assert float(rate_of(state)) == cap
    np.testing.assert_array_equal(updates, [-2 * cap, -2 * cap])
    updates, state = step(dal(p, 3.0), still, jnp.zeros(2))
    assert float(rate_of(state)) == cap
    np.testing.assert_array_equal(updates, [0.0, 0.0])


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_derivatives_are_finite(start):
    # With respect to everything that a rate may depend on, at a minimum too.
    loss = lambda w: jnp.sum(w**4) + jnp.sum(w**2)
    sensitivity = jax.jacobian(lambda w, p: step(dal(p), loss, w)[0], argnums=(0, 1))
    for part in jax.jit(sensitivity)(jnp.full(2, start), jnp.array(0.8)):
        assert np.isfinite(part).all()


def test_size_of_the_gradient_does_not_matter_even_where_squares_underflow():
    curve = jnp.array(SPECTRUM, jnp.float32)
    loss = lambda w: jnp.sum(curve * w**2) / 2
    w = jnp.array([1.0, -2.0, 0.5], jnp.float32)
    rates = [rate_of(step(dal(), loss, s * w)[1]) for s in (1.0, 1e-30, 1e18)]
    np.testing.assert_allclose(rates, rates[0], rtol=1e-6)


def test_nan_is_not_hidden():
    loss = lambda w: jnp.sum(w**2)
    bad = jnp.array([jnp.nan, 1.0])
    updates, state = dal().update(bad, dal().init(bad), jnp.ones(2), value_fn=loss)
    assert np.isnan(updates).any()
    hidden = dal().update(jnp.ones(2), state, hvp=lambda v: v * jnp.nan)
    assert np.isnan(rate_of(hidden[1]))


def test_dtypes_are_kept(dtype):
    params = {"a": jnp.ones((2, 2), dtype), "b": jnp.ones((), dtype)}
    loss = lambda t: jnp.sum(t["a"] ** 4) * t["b"] ** 2
    updates, state = jax.jit(lambda w: step(dal(0.5), loss, w))(params)
    assert {x.dtype for x in jax.tree.leaves((updates, state))} == {jnp.dtype(dtype)}
    assert rate_of(state).shape == ()


def test_mixed_dtypes():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    loss = lambda t: jnp.sum(t["a"].astype(jnp.float32) ** 2) + jnp.sum(t["b"] ** 2)
    with jax.numpy_dtype_promotion("strict"):
        updates, state = step(dal(), loss, params)
    assert updates["a"].dtype == jnp.bfloat16 and rate_of(state).dtype == jnp.float32
    np.testing.assert_allclose(rate_of(state), 1.0, rtol=1e-2)


def test_jit_and_vmap_over_the_power():
    problem = rj.problems.quadratic(SPECTRUM, seed=0)
    powers = jnp.linspace(0.0, 1.0, 5)
    run = jax.jit(jax.vmap(lambda p: step(dal(p), problem.loss, problem.params)))
    _, states = run(powers)
    expected = [
        rate_of(step(dal(float(p)), problem.loss, problem.params)[1]) for p in powers
    ]
    np.testing.assert_allclose(rate_of(states), expected, rtol=1e-12)


def batch_loss(params, batch, weight=1.0):
    return weight * jnp.mean((batch @ params) ** 2) / 2


def test_the_batch_is_passed_on_and_sets_the_rate():
    tx, params = dal(max_lr=1e3), jnp.array([1.0, 2.0])
    state = tx.init(params)
    for number in range(3):
        batch = jax.random.normal(jax.random.key(number), (4, 2))
        own = lambda w, batch=batch: 3.0 * batch_loss(w, batch)
        grad = jax.grad(own)(params)
        passed = {"value": jnp.array(0.0), "grad": grad, "unknown": 7}
        updates, state = tx.update(
            grad, state, params, value_fn=batch_loss, batch=batch, weight=3.0, **passed
        )
        expected, closed = tx.update(grad, state, params, value_fn=own)
        np.testing.assert_allclose(updates, expected, rtol=1e-12)
        np.testing.assert_allclose(rate_of(state), rate_of(closed), rtol=1e-12)
        np.testing.assert_allclose(rate_of(state), formula(own, params, 1.0, 1e3))
        params = optax.apply_updates(params, updates)


def test_optax_own_arguments_do_not_reach_the_loss():
    loss = loss_of_params("dal", lambda w, value=1.0: w * value, 1, {"value": 5.0})
    assert loss(2.0) == 2.0


def test_hvp_in_place_of_the_loss():
    problem = rj.problems.quadratic(SPECTRUM, seed=1)
    w, tx = problem.params, dal(0.8)
    grad = jax.grad(problem.loss)(w)
    product = lambda v: rj.hvp(problem.loss, w, v)
    expected, _ = step(tx, problem.loss, w)
    updates, _ = tx.update(grad, tx.init(w), hvp=product)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-12)


def test_plain_training_loop_and_momentum():
    problem = rj.problems.factorization((4, 3, 2), [2.0, 1.0], seed=1)
    momentum = optax.chain(scale_by_dal(), optax.trace(0.5), optax.scale(-1.0))
    for tx in (dal(), momentum):

        @jax.jit
        def train(params, tx=tx):
            def body(carry, _):
                params, state = carry
                value, grad = jax.value_and_grad(problem.loss)(params)
                updates, state = tx.update(grad, state, params, value_fn=problem.loss)
                carry = (optax.apply_updates(params, updates), state)
                return carry, (value, rate_of(state))

            return jax.lax.scan(body, (params, tx.init(params)), length=200)[1]

        losses, rates = train(problem.params)
        assert losses[-1] < 1e-2 * losses[0]
        assert (rates > 0).all() and (rates <= 5).all()


def test_trains_where_gradient_descent_at_its_highest_rate_diverges():
    problem = rj.problems.factorization((4, 3, 2), [2.0, 1.0], seed=1)
    dynamics = rj.dynamics(dal(), problem.loss)
    highest = rj.Metric(
        lambda seen, *, lr: jnp.zeros(()),
        lambda seen, top, *, lr: (
            {"top": jnp.maximum(top, rate_of(merge(seen.centre)[1]))},
            jnp.maximum(top, rate_of(merge(seen.centre)[1])),
        ),
    )
    run = rj.descend(dynamics, problem.params, 60, metrics=[highest])
    assert run.metrics["loss"][-1] < 0.05 * run.metrics["loss"][0]
    fixed = rj.dynamics(optax.sgd(float(run.metrics["top"][-1])), problem.loss)
    assert not rj.descend(fixed, problem.params, 60).metrics["loss"][-1] < 1e3


def test_runs_as_dynamics():
    problem = rj.problems.quadratic(SPECTRUM, seed=2)
    dynamics = rj.dynamics(dal(), problem.loss)
    run = rj.descend(dynamics, problem.params, 6)
    w, state = problem.params, dal().init(problem.params)
    for t in range(6):
        np.testing.assert_allclose(run.ends["w"][t, 0], w["w"], rtol=1e-9)
        grad = jax.grad(problem.loss)(w)
        updates, state = dal().update(grad, state, w, value_fn=problem.loss)
        w = optax.apply_updates(w, updates)


def test_state_holds_the_rate_only():
    state = scale_by_dal().init(jnp.ones(2))
    assert isinstance(state, ScaleByDalState) and float(state.learning_rate) == 0


@pytest.mark.parametrize("p", [-0.1, float("nan")])
def test_bad_power_is_named(p):
    with pytest.raises(ValueError, match=r"p=.*p >= 0"):
        dal(p)


@pytest.mark.parametrize("max_lr", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_cap_is_named(max_lr):
    with pytest.raises(ValueError, match=r"max_lr=.*positive and finite"):
        dal(max_lr=max_lr)


def test_missing_loss_and_params_are_named():
    w, tx = jnp.ones(2), dal()
    with pytest.raises(ValueError, match="dal needs the loss"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="dal needs the parameters"):
        tx.update(w, tx.init(w), value_fn=jnp.sum)


@pytest.mark.parametrize("params", [{}, jnp.arange(3), jnp.ones(2, jnp.complex64)])
def test_bad_params_are_named(params):
    with pytest.raises(ValueError, match="params has"):
        dal().init(params)
