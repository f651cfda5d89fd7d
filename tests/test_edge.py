"""The edge flow: closed forms on quadratics, any optimizer's edge, unit-step form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import field, heun, order, walk

import rodjax as rj
from rodjax.flows import EdgeState, edge
from rodjax.transforms import edge_gradient_descent, scalar_adam

KEY = jax.random.key(0)
SLOPES = np.array([4.0, 1.5, 0.5])
BOWL = rj.dynamics(optax.sgd, lambda w: 0.5 * w @ (jnp.asarray(SLOPES) * w))
ONES = jnp.ones(3)
unit = lambda v: v / np.linalg.norm(v)


def state(dynamics, w, direction, radius, lr):
    """An edge state whose direction is in the parameters alone."""
    mean = dynamics.init(w, lr=lr)
    rest = optax.tree.zeros_like(mean.phase[1:])
    return EdgeState(mean, (jnp.asarray(direction), *rest), jnp.asarray(radius))


# --- quadratics, in closed form ----------------------------------------------------


@jax.jit
@jax.vmap
def tilted(lr):
    """Whole steps from an oscillation along (1, 1/2, 0): centres and rods."""
    flow = edge(BOWL, floor=0.0)
    y = state(BOWL, ONES, unit(np.array([1.0, 0.5, 0.0])), 0.1, lr)
    path = walk(flow, y, 8, lr=lr, substeps=128)
    ends = jax.vmap(lambda y: flow.observe(y, lr=lr)[0])(path)
    return path.mean.params, 0.5 * (ends[:, 0] - ends[:, 1])


def test_quadratic_in_closed_form():
    """Below and above the edge: centre, direction (1, b) and radius by themselves."""
    rates, t = np.array([0.2, 0.55]), np.arange(9.0)
    for lr, centre, rod in zip(rates, *tilted(rates), strict=True):
        exact = np.exp(-lr * np.outer(t, SLOPES))
        np.testing.assert_allclose(centre, exact, rtol=2e-3)
        # r u = 0.1 exp((eta H - 2) t) u0: the radius is its length.
        tilt = unit(np.array([1.0, 0.5, 0.0]))
        exact = 0.1 * np.exp(lr * np.outer(t, SLOPES) - 2.0 * t[:, None]) * tilt
        np.testing.assert_allclose(rod, exact, rtol=5e-3, atol=1e-12)
        # What is left of the second eigenvector decays at the rate eta (l1 - l2).
        rate = np.diff(np.log(rod[:, 1] / rod[:, 0]))
        np.testing.assert_allclose(rate, -lr * (4.0 - 1.5), rtol=1e-3)


@pytest.mark.parametrize("floor, relative", [(None, 2.0**-52), (1e-6, 1e-6)])
def test_floor_holds(floor, relative):
    """Where r' = (eta S - 2) r + 2 (floor - r) = 0, in a slowly moving valley."""
    slopes = jnp.array([1.0, 1e-9])
    dynamics = rj.dynamics(optax.sgd(1.0), lambda w: 0.5 * w @ (slopes * w))
    start = jnp.array([0.0, 2.0])
    y = state(dynamics, start, [1.0, 0.0], 1e-3, None)
    y = heun(edge(dynamics, floor=floor))(y, None, 240)
    # 2 (2 relative - r) = r
    np.testing.assert_allclose(y.radius, 4.0 * relative / 3.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_without_a_floor_the_radius_vanishes_and_nothing_breaks(dtype):
    flow, lr = edge(BOWL, floor=0.0), jnp.asarray(0.2, dtype)
    y = heun(flow)(flow.init(ONES.astype(dtype), lr=lr, key=KEY), lr, 4000)
    np.testing.assert_allclose(optax.tree.norm(y.direction), 1.0, rtol=1e-3)
    assert y.radius == 0.0 and bool(jnp.all(jnp.isfinite(y.mean.params)))


def test_starts_at_zero_with_a_direction():
    """The parameters may be zero, as for a linear model, and move from there."""
    dynamics = rj.dynamics(optax.sgd(0.6), lambda w: BOWL.loss(w - 1.0))
    flow = edge(dynamics)
    y = heun(flow)(flow.init(jnp.zeros(3), lr=None, key=KEY), None, 160)
    np.testing.assert_allclose(np.abs(y.direction[0]), [1, 0, 0], atol=1e-8)
    # The floor, of size eps, has been grown from, at eta S - 2 = 0.4.
    assert 1e-10 < float(y.radius) < 1e-7
    after = heun(flow)(y, None, 40)
    np.testing.assert_allclose(np.log(after.radius / y.radius), 4.0, rtol=1e-2)


# --- any optimizer -----------------------------------------------------------------


HESSIAN = np.array([[3.0, 0.5, 0.0], [0.5, 2.0, -0.3], [0.0, -0.3, 1.0]])
TILTED = lambda w: 0.5 * w @ jnp.asarray(HESSIAN) @ w


def phase_of(mean, vector):
    """A vector over (parameters, trace), put in the phase's structure."""
    like = jax.tree.structure(mean.phase)
    return like.unflatten(jnp.split(jnp.asarray(vector), like.num_leaves))


def flat(phase):
    return np.concatenate([np.asarray(x) for x in jax.tree.leaves(phase)])


def heavy_ball_map(lr, beta, nesterov):
    """M = -Phi' over (w, trace): t' = g + beta t, and w' = w - lr t' or as Nesterov."""
    one, h = np.eye(3), HESSIAN
    ahead = (1.0 + beta, beta**2) if nesterov else (1.0, beta)
    top = [one - lr * ahead[0] * h, -lr * ahead[1] * one]
    return -np.block([top, [h, beta * one]])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("ratio", [0.8, 1.1])
def test_momentum_against_the_dense_map(nesterov, ratio):
    """Away from an eigenvector too: u' and r' of the linear map of a quadratic."""
    beta = 0.9
    top = np.linalg.eigvalsh(HESSIAN)[-1]
    lr = ratio * (2 + 2 * beta) / ((1 + 2 * beta) if nesterov else 1.0) / top
    dynamics = rj.dynamics(optax.sgd(lr, momentum=beta, nesterov=nesterov), TILTED)
    matrix = heavy_ball_map(lr, beta, nesterov)
    mean = dynamics.init(jnp.array([0.3, -0.2, 0.5]), lr=None)
    values, vectors = map(np.real, np.linalg.eig(matrix))
    first = np.argmax(values.real)
    for u in (unit(np.arange(1.0, 7.0)), unit(vectors[:, first].real)):
        y = EdgeState(mean, phase_of(mean, u), jnp.asarray(1e-3))
        dy = field(edge(dynamics), y)
        turned = matrix @ u
        np.testing.assert_allclose(
            flat(dy.direction), turned - (u @ turned) * u, atol=1e-12
        )
        np.testing.assert_allclose(dy.radius / 1e-3, u @ turned - 1.0, rtol=1e-9)
    if ratio > 1:
        # At the fixed direction: unstable, real, r grows by |multiplier| - 1 a step.
        assert values[first].imag == 0 and values[first].real > 1
        multiplier = np.abs(values).max()
        np.testing.assert_allclose(dy.radius / 1e-3, multiplier - 1.0, rtol=1e-9)
        np.testing.assert_allclose(flat(dy.direction), 0.0, atol=1e-9)


def test_momentum_finds_its_unstable_direction():
    lr, beta = 1.2, 0.9
    dynamics = rj.dynamics(optax.sgd(lr, momentum=beta), TILTED)
    values = np.linalg.eigvals(heavy_ball_map(lr, beta, nesterov=False))
    flow, solve = edge(dynamics), heun(edge(dynamics))
    before = solve(flow.init(ONES, lr=None, key=KEY), None, 1600)
    after = solve(before, None, 200)
    growth = np.log(after.radius / before.radius) / 50
    np.testing.assert_allclose(growth, values.real.max() - 1.0, rtol=1e-3)


@pytest.mark.parametrize("w", [[0.0, 0.0, 0.0], [0.3, -0.2, 0.5]])
def test_rmsprop_against_the_dense_map(w):
    """The second moment answers to the gradient within the step; at rest it is frozen.

    Its derivative by hand: nu' = b nu + (1 - b) g^2, dw = -lr g / sqrt(nu' + eps).
    """
    lr, decay, eps = 0.5, 0.9, 1e-8
    dynamics = rj.dynamics(optax.rmsprop(lr, decay=decay, eps=eps), TILTED)
    nu, w = np.array([0.2, 0.5, 1.0]), np.asarray(w)
    mean = dynamics.init(jnp.asarray(w), lr=None)
    mean = mean._replace(slow=jax.tree.map(lambda _: jnp.asarray(nu), mean.slow))
    g = HESSIAN @ w
    root = np.sqrt(decay * nu + (1 - decay) * g**2 + eps)
    matrix = lr * (1 / root - (1 - decay) * g**2 / root**3)[:, None] * HESSIAN
    matrix -= np.eye(3)
    values, vectors = map(np.real, np.linalg.eig(matrix))
    for u in (unit(np.array([1.0, 2.0, 3.0])), vectors[:, np.argmax(values)]):
        y = EdgeState(mean, (jnp.asarray(u), *mean.phase[1:]), jnp.asarray(1e-9))
        dy = field(edge(dynamics), y)
        turned = matrix @ u
        rate = dy.radius / 1e-9
        np.testing.assert_allclose(rate, u @ turned - 1.0, rtol=1e-9)
        np.testing.assert_allclose(
            dy.direction[0], turned - (u @ turned) * u, atol=1e-12
        )
    np.testing.assert_allclose(rate, values.max() - 1.0, rtol=1e-9)


@pytest.mark.parametrize(
    "beta, nesterov", [(0.0, False), (0.9, False), (0.5, True), (0.9, True)]
)
def test_marginal_exactly_at_the_threshold(beta, nesterov):
    """With w' = -w at curvature l the trace is t' = -t = l w + beta t."""
    momentum = {"momentum": beta, "nesterov": nesterov} if beta else {}
    build = lambda lr: optax.sgd(lr, **momentum)
    plain = rj.dynamics(build, jnp.sum)
    lr, top = jnp.asarray(0.05), rj.threshold(plain, ONES, lr=0.05)
    slopes = top * jnp.array([1.0, 0.5, 0.1])
    dynamics = rj.dynamics(build, lambda w: 0.5 * w @ (slopes * w))
    mean = dynamics.init(jnp.zeros(3), lr=lr)
    u = np.array([1.0, 0.0, 0.0])
    u = np.concatenate([u, -top / (1.0 + beta) * u]) if beta else u
    y = EdgeState(mean, phase_of(mean, unit(u)), jnp.asarray(1.0))
    dy = field(edge(dynamics), y, lr)
    np.testing.assert_allclose(dy.radius, 0.0, atol=1e-11)
    np.testing.assert_allclose(flat(dy.direction), 0.0, atol=1e-11)


@pytest.mark.parametrize("build", [optax.adam, optax.rmsprop, optax.nadam, scalar_adam])
def test_dead_coordinates_give_no_nan(build):
    """Gradient and second moment are zero there, whose root has no derivative."""
    loss = lambda p: 0.5 * p["used"] ** 2 + 0.0 * jnp.sum(p["idle"] ** 2)
    dynamics = rj.dynamics(build(0.01), loss)
    start = {"used": jnp.array(1.0), "idle": jnp.array([1.0, -2.0])}
    flow = edge(dynamics)
    y = heun(flow)(flow.init(start, lr=None, key=KEY), None, 20)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(y))
    assert 0.9 < float(y.mean.params["used"]) < 0.99
    np.testing.assert_array_equal(y.mean.params["idle"], start["idle"])


# --- against the optimizer, and its unit-step form -----------------------------------


@pytest.mark.parametrize("build", [optax.sgd, partial(optax.sgd, momentum=0.5)])
def test_first_order_in_the_learning_rate(build):
    """Below the edge, as the stable flow: distance to the midpoints at equal times."""
    loss = lambda w: TILTED(w) + jnp.cosh(w[0] - w[1]) + w[2] ** 4
    dynamics = rj.dynamics(build, loss)
    flow, rates, errors = edge(dynamics), [0.02, 0.01, 0.005], []
    solve = heun(flow)
    for lr, steps in zip(rates, (20, 40, 80), strict=True):
        run = partial(rj.warm_up, dynamics, ONES, lr=lr)
        begin, end = run(steps // 5), run(steps // 5 + steps)
        y = solve(flow.init(begin, lr=jnp.asarray(lr), key=KEY), lr, 4 * steps)
        errors.append(np.linalg.norm(y.mean.params - rj.midpoint(end).params))
    assert abs(order(rates, errors) - 1.0) < 0.2, errors


def test_unit_step_is_edge_gradient_descent():
    """Euler's step is EGD's: the same centre; r and u to first order."""
    loss = lambda w: TILTED(w) + 0.3 * jnp.sum(w**4) + jnp.sin(w[0] * w[1])
    w, u, r = jnp.array([0.6, -0.4, 0.3]), unit(np.array([3.0, 1.0, -1.0])), 0.2
    curvature = u @ np.asarray(jax.hessian(loss)(w)) @ u

    dynamics = rj.dynamics(optax.sgd, loss)

    @jax.jit
    def both(lr):
        """The moves of the centre, and by how much the direction and radius differ."""
        y = state(dynamics, w, u, r, lr)
        dy = edge(dynamics, floor=0.0).vector_field(0.0, y, lr)
        tx = edge_gradient_descent(lr, floor=0.0)
        before = tx.init(w)._replace(direction=jnp.asarray(u), radius=jnp.asarray(r))
        updates, after = tx.update(w, before, w, value_fn=loss)
        turn = jnp.linalg.norm(u + dy.direction[0] - after.direction)
        return dy.mean.params, updates, turn, abs(r + dy.radius - after.radius)

    def apart(lr):
        field, updates, turn, growth = both(lr)
        np.testing.assert_allclose(field, updates, rtol=1e-12)
        return turn, growth

    turns = [apart(lr)[0] for lr in (1e-2, 1e-3)]
    assert turns[1] < 0.012 * turns[0]
    # The radius, about the edge of the direction.
    grown = [apart((2.0 + x) / curvature)[1] for x in (1e-2, 1e-3)]
    np.testing.assert_allclose(grown, [r * 1e-4 / 2, r * 1e-6 / 2], rtol=1e-2)


@pytest.mark.slow
def test_holds_the_edge_on_digits():
    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd(0.6), problem.loss)
    window = rj.warm_up(dynamics, problem.params, steps=20)
    flow = edge(dynamics)
    y, solve = flow.init(window, lr=None, key=KEY), heun(flow)
    ratio = jax.jit(lambda w: 0.3 * rj.sharpness(problem.loss, w, tol=1e-3).value)
    late = []
    for quarters in (1440, 120, 120):
        y = solve(y, None, quarters)
        late.append(ratio(y.mean.params))
    np.testing.assert_allclose(late, 1.0, atol=0.02)
    assert 1e-3 < float(y.radius) < 0.1
