"""Edge gradient descent: its formula, its cost, and what it does at the edge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.transforms import edge_gradient_descent


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


def descend(tx, loss, params, steps, state=None, **extra):
    """Parameters before every step and after the last, the state, and the losses."""
    state = tx.init(params) if state is None else state

    def body(carry, _):
        w, state = carry
        # What it is given as gradient must not matter.
        wrong = optax.tree.full_like(w, jnp.nan)
        updates, new = tx.update(wrong, state, w, value_fn=loss, **extra)
        return (optax.apply_updates(w, updates), new), (loss(w, **extra), new.radius)

    run = jax.jit(lambda w, s: jax.lax.scan(body, (w, s), length=steps))
    (params, state), (losses, radii) = run(params, state)
    return params, state, losses, radii


def one(tx, loss, params, state=None):
    """A single step: updates and state."""
    state = tx.init(params) if state is None else state
    return jax.jit(lambda w, s: tx.update(w, s, w, value_fn=loss))(params, state)


def usual_losses(loss, params, lr, steps):
    """The losses of gradient descent."""

    def body(w, _):
        value, grad = jax.value_and_grad(loss)(w)
        return optax.tree.add_scale(w, -lr, grad), value

    return jax.jit(lambda w: jax.lax.scan(body, w, length=steps))(params)[1]


def rises(losses):
    """How much the loss climbs in all."""
    return float(jnp.sum(jnp.maximum(jnp.diff(losses), 0)))


def test_one_step_is_the_formula():
    loss = lambda w: jnp.sum(jnp.cosh(w)) + jnp.prod(w)
    lr, w = 0.3, jnp.array([0.4, -0.9, 1.3])
    tx = edge_gradient_descent(lr)
    u = np.array([0.6, 0.0, -0.8])
    state = tx.init(w)._replace(direction=jnp.array(u), radius=jnp.array(0.5))
    updates, new = one(tx, loss, w, state)
    ends = jnp.stack([w + 0.5 * u, w - 0.5 * u])
    gradients, h = jax.jit(
        lambda w, ends: (jax.vmap(jax.grad(loss))(ends), jax.hessian(loss)(w))
    )(w, ends)
    h = np.asarray(h)
    np.testing.assert_allclose(updates, -lr * gradients.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(new.radius, 0.5 * np.exp(lr * u @ h @ u - 2), rtol=1e-12)
    turned = u + lr * h @ u
    np.testing.assert_allclose(new.direction, turned / np.linalg.norm(turned))
    assert int(new.count) == 1


def test_direction_turns_as_the_rayleigh_quotient_flow():
    h = jnp.diag(jnp.array([2.0, 0.5, -1.0]))
    u, lr = np.array([0.6, 0.64, 0.48]), 1e-5
    tx = edge_gradient_descent(lr)
    w = jnp.ones(3)
    state = tx.init(w)._replace(direction=jnp.array(u))
    _, new = one(tx, lambda w: w @ h @ w / 2, w, state)
    flow = h @ u - (u @ h @ u) * u
    np.testing.assert_allclose((new.direction - u) / lr, flow, atol=1e-4)


def test_costs_two_gradients_and_one_product():
    seen = []

    def loss(w):
        # At every evaluation, however often it is traced.
        jax.debug.callback(seen.append, w)
        return jnp.sum(w**4)

    w, tx = jnp.ones(3), edge_gradient_descent(0.1)
    tx.update(w, tx.init(w), w, value_fn=loss)
    jax.effects_barrier()
    # Each gradient, and the product, differentiates the loss once.
    assert len(seen) == 3


def test_below_the_edge_on_a_quadratic_it_is_gradient_descent():
    problem = rj.problems.quadratic([3.0, 1.0, 0.2, -0.1], seed=1)
    tx = edge_gradient_descent(0.5, floor=1e-2)
    *_, losses, _ = descend(tx, problem.loss, problem.params, 20)
    expected = usual_losses(problem.loss, problem.params, 0.5, 20)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_above_the_edge_on_a_quadratic_the_radius_grows_with_the_top_curvature():
    # The flat and the concave direction would win if S u were taken off.
    hessian = jnp.diag(jnp.array([2.2, 1.0, 0.0, -0.5]))
    tx, w = edge_gradient_descent(1.0), jnp.zeros(4)
    state = tx.init(w)._replace(radius=jnp.array(1e-9))
    _, state, _, radii = descend(tx, lambda w: w @ hessian @ w / 2, w, 80, state)
    np.testing.assert_allclose(jnp.diff(jnp.log(radii))[-10:], 0.2, rtol=1e-9)
    np.testing.assert_allclose(jnp.abs(state.direction), [1, 0, 0, 0], atol=1e-9)


def test_radius_stays_at_its_floor_below_the_edge():
    problem = rj.problems.quadratic([3.0, 1.0], seed=0)
    for floor in (None, 1e-3):
        tx = edge_gradient_descent(0.1, floor=floor)
        _, state, *_ = descend(tx, problem.loss, problem.params, 5)
        before, *_ = descend(tx, problem.loss, problem.params, 4)
        relative = jnp.finfo(float).eps if floor is None else floor
        assert float(state.radius) == relative * float(jnp.linalg.norm(before["w"]))


def test_settles_at_the_edge_without_oscillating_on_progressive_sharpening():
    problem, lr = rj.problems.berthier(initial=(0.1, 6.5)), 0.3
    tx = edge_gradient_descent(lr, floor=1e-2)
    w, _, losses, _ = descend(tx, problem.loss, problem.params, 3000)
    usual = usual_losses(problem.loss, problem.params, lr, 3000)
    assert rises(losses) < 0.1 * rises(usual)
    assert losses[-1] < usual[-1]
    ratio = lr / 2 * rj.sharpness(problem.loss, w).value
    np.testing.assert_allclose(ratio, 1.0, atol=0.02)


@pytest.mark.slow
def test_smooths_the_digits_at_the_edge():
    problem, lr = rj.problems.digits_mlp(), 0.6
    usual = usual_losses(problem.loss, problem.params, lr, 450)
    assert rises(usual) > 0.05
    smooth = lambda floor: descend(
        edge_gradient_descent(lr, floor=floor), problem.loss, problem.params, 450
    )
    # The default floor and a larger one.
    w, _, losses, _ = jax.vmap(smooth)(jnp.array([jnp.finfo(float).eps, 1e-3]))
    assert (losses[:, -1] < usual[-1]).all()
    assert rises(losses[0]) < 0.1 * rises(usual) and rises(losses[1]) == 0
    w = jax.tree.map(lambda x: x[1], w)
    ratio = lr / 2 * rj.sharpness(problem.loss, w).value
    np.testing.assert_allclose(ratio, 1.0, atol=0.05)


@pytest.mark.slow
def test_runs_as_dynamics():
    problem = rj.problems.factorization((3, 2, 2), [2.0, 1.0])
    make = lambda lr: edge_gradient_descent(lr, floor=1e-2)
    dynamics = rj.dynamics(make, problem.loss)
    run = rj.descend(dynamics, problem.params, 30, lr=0.4)
    *_, losses, _ = descend(make(0.4), problem.loss, problem.params, 31)
    found = jax.vmap(problem.loss)(jax.tree.map(lambda x: x[:, 0], run.ends))
    np.testing.assert_allclose(found, losses, rtol=1e-9)


def test_learning_rate_may_be_a_schedule_or_traced():
    problem = rj.problems.berthier(initial=(0.3, 5.0))
    constant, *_ = descend(edge_gradient_descent(0.2), problem.loss, problem.params, 10)
    for lr in (jnp.array(0.2), lambda count: 0.2, optax.constant_schedule(0.2)):
        w, *_ = descend(edge_gradient_descent(lr), problem.loss, problem.params, 10)
        np.testing.assert_allclose(w["y"], constant["y"], rtol=1e-12)
    steps = edge_gradient_descent(optax.piecewise_constant_schedule(0.2, {3: 0.0}))
    stopped, state, *_ = descend(steps, problem.loss, problem.params, 10)
    after, *_ = descend(steps, problem.loss, problem.params, 4)
    assert stopped == after and int(state.count) == 10


def test_vmap_over_learning_rates():
    problem = rj.problems.berthier(initial=(0.3, 5.0))
    run = lambda lr: descend(
        edge_gradient_descent(lr), problem.loss, problem.params, 10
    )[0]
    rates = jnp.array([0.1, 0.2])
    found = jax.vmap(run)(rates)
    np.testing.assert_allclose(found["x"], [run(lr)["x"] for lr in rates], rtol=1e-12)


def test_dtypes_are_kept(dtype):
    params = {"a": jnp.ones((2, 2), dtype), "b": jnp.ones((), dtype)}
    loss = lambda t: jnp.sum(t["a"] ** 4) * t["b"] ** 2
    tx = edge_gradient_descent(0.1)
    state = tx.init(params)
    updates, new = one(tx, loss, params, state)
    floats = (updates, new.direction, new.radius)
    assert {x.dtype for x in jax.tree.leaves(floats)} == {jnp.dtype(dtype)}
    assert jax.eval_shape(lambda: state) == jax.eval_shape(lambda: new)


def test_mixed_dtypes():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    loss = lambda t: jnp.sum(t["a"].astype(jnp.float32) ** 2) + jnp.sum(t["b"] ** 2)
    tx = edge_gradient_descent(0.1)
    with jax.numpy_dtype_promotion("strict"):
        updates, new = one(tx, loss, params)
    assert updates["a"].dtype == new.direction["a"].dtype == jnp.bfloat16
    assert new.radius.dtype == jnp.float32


def test_batches_are_passed_on():
    loss = lambda w, batch: jnp.mean((batch @ w) ** 4)
    batch = jax.random.normal(jax.random.key(1), (5, 2))
    tx, w = edge_gradient_descent(0.05), jnp.ones(2)
    named, *_ = descend(tx, loss, w, 5, batch=batch)
    closed, *_ = descend(tx, lambda w: loss(w, batch), w, 5)
    np.testing.assert_allclose(named, closed, rtol=1e-12)


def test_key_draws_the_direction():
    w = jnp.ones(50)
    first, same, other = (
        edge_gradient_descent(0.1, key=key).init(w).direction
        for key in (3, jax.random.key(3), 4)
    )
    np.testing.assert_array_equal(first, same)
    assert abs(float(first @ other)) < 0.9
    np.testing.assert_allclose(jnp.linalg.norm(first), 1.0)


def test_a_direction_that_would_vanish_is_kept():
    tx, w = edge_gradient_descent(1.0), jnp.array(0.5)
    _, state = one(tx, lambda w: -(w**2) / 2, w)
    assert abs(float(state.direction)) == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"floor=-1.*floor >= 0"):
        edge_gradient_descent(0.1, floor=-1.0)
    w, tx = jnp.ones(2), edge_gradient_descent(0.1)
    with pytest.raises(ValueError, match="edge_gradient_descent needs the loss"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="edge_gradient_descent needs the param"):
        tx.update(w, tx.init(w), value_fn=jnp.sum)
    with pytest.raises(ValueError, match="params has"):
        tx.init({})
