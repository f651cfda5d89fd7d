"""The central flow against closed forms, and a dense one written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import lane
from jax.flatten_util import ravel_pytree
from scipy.linalg import eigh

import rodjax as rj
from rodjax.flows import central
from rodjax.transforms import scalar_rmsprop

cvxpy = pytest.importorskip("cvxpy")

ETA, GAMMA = 0.3, 4.0
KEY = jax.random.key(0)


def pair_of_valleys(params):
    """Two valleys of Berthier's kind side by side, each of the sharpness y."""
    x, y = params["x"], params["y"]
    return jnp.sum(y * x**2 / 2 - jnp.array([0.01, 0.03]) * y)


VALLEYS = rj.dynamics(optax.sgd(ETA), pair_of_valleys)


@pytest.mark.parametrize(
    "above", [pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 0.2)]
)
def test_two_equal_eigenvalues_return_to_the_edge_at_rate_gamma(above):
    # A + B[X] = 0 says 2 - eta (y + y'/gamma) = 0, of each valley by itself.
    begin = {"x": jnp.zeros(2), "y": 2 / ETA + jnp.array([above, 0.5 * above])}
    flow = central(VALLEYS, rank=3, gamma=GAMMA)
    path = rj.integrate(flow, begin, steps=3, substeps=32)
    decay = np.exp(-GAMMA * np.arange(4))[:, None]
    truth = 2 / ETA + np.array([above, 0.5 * above]) * decay
    np.testing.assert_allclose(path.params["y"], truth, atol=3e-4 * above + 1e-9)
    np.testing.assert_allclose(path.params["x"], 0.0, atol=1e-12)
    # Held there, the oscillation balances the forcing: sigma^2 = 2 eps in each.
    spread = jnp.mean(path.ends["x"][-1] ** 2, 0)
    kept = above * decay[-1, 0] * np.array([2.0, 1.0]) * GAMMA / ETA
    np.testing.assert_allclose(spread, [0.02 + kept[0], 0.06 + kept[1]], rtol=1e-2)
    expected = float(
        pair_of_valleys({"x": jnp.sqrt(spread), "y": path.params["y"][-1]})
    )
    np.testing.assert_allclose(path.metrics["predicted_loss"][-1], expected, rtol=1e-6)
    assert float(jnp.max(path.metrics["complementarity"])) < 1e-9


def test_below_the_edge_it_is_gradient_flow():
    begin = {"x": jnp.array([0.3, -0.2]), "y": jnp.array([3.0, 1.0])}
    common = {"steps": 20, "every": 20, "substeps": 4}
    path = rj.integrate(central(VALLEYS), begin, **common)
    plain = rj.integrate(rj.flows.gradient(VALLEYS), begin, **common)
    for name in "xy":
        np.testing.assert_allclose(path.params[name], plain.params[name], rtol=1e-13)
    assert float(path.metrics["amplitude"][-1]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_warm_up_from_zero_starts_no_oscillation(dtype):
    warm = rj.dynamics(optax.sgd(optax.linear_schedule(0.0, 0.2, 8)), pair_of_valleys)
    begin = {"x": jnp.array([0.3, -0.2], dtype), "y": jnp.array([3.0, 1.0], dtype)}
    path = rj.integrate(central(warm), begin, steps=8)
    plain = rj.integrate(rj.flows.gradient(warm), begin, steps=8)
    np.testing.assert_allclose(path.params["y"], plain.params["y"], rtol=1e-6)
    np.testing.assert_allclose(path.metrics["amplitude"], 0.0, atol=1e-6)


def test_where_nothing_holds_the_edge_it_says_so():
    steep = rj.dynamics(optax.sgd(1.0), lambda w: 0.5 * jnp.sum(2.5 * w**2))
    path = rj.integrate(central(steep), jnp.array([1.0, 0.5]), steps=2)
    assert float(path.metrics["complementarity"][-1]) > 0.1
    assert bool(jnp.all(jnp.isfinite(path.params)))


def bent(params):
    """Six parameters, bent in every direction but one, whose gradient is zero."""
    w, v = params["w"], params["v"]
    mix = jnp.array([[2.0, 0.3, -0.4], [0.3, 1.5, 0.2], [-0.4, 0.2, 1.8]])
    s = mix @ w + 0.5 * v[:2] @ jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.7]])
    return (
        0.5 * s @ s
        + jnp.sum(jnp.sin(w + 0.5)) * v[0]
        + jnp.cosh(v[1] * w[2])
        + v[2] * 0
    )


POINT = {"v": jnp.array([0.7, -0.9, 0.4]), "w": jnp.array([0.9, -0.6, 0.8])}
DECAY, EPS, STEP = 0.9, 1e-3, 7.0


def schedule(lr):
    return lambda count: lr * (1.0 + 0.01 * count)


# name -> (optimizer, entries of nu, relative rate at STEP and its slope, corrected).
CASES = {
    "gd": (optax.sgd, 0, (1.0, 0.0), False),
    "gd on a schedule": (lambda lr: optax.sgd(schedule(lr)), 0, (1.07, 0.01), False),
    "rmsprop": (lambda lr: optax.rmsprop(lr, DECAY, EPS), 6, (1.0, 0.0), False),
    "rmsprop, bias-corrected, on a schedule": (
        lambda lr: optax.rmsprop(schedule(lr), DECAY, EPS, bias_correction=True),
        *(6, (1.07, 0.01), True),
    ),
    "scalar rmsprop": (
        lambda lr: scalar_rmsprop(lr, DECAY, EPS, bias_correction=True),
        *(1, (1.0, 0.0), True),
    ),
}


def dense_central(nu, entries, schedule, corrected):
    """The paper's formulas, dense, at the learning rate that makes l_2 = 1.95."""
    flat, unravel = ravel_pytree(POINT)
    loss = lambda x: bent(unravel(x))
    g = np.asarray(jax.grad(loss)(flat))
    hessian = np.asarray(jax.hessian(loss)(flat))
    third = np.asarray(jax.jacfwd(jax.hessian(loss))(flat))

    def preconditioner(nu, dt=0.0, lr=1.0):
        rate = lr * (schedule[0] + schedule[1] * dt)
        if not entries:
            return np.ones(6) / rate
        seen = nu / (1 - DECAY ** (STEP + dt + 1)) if corrected else nu
        return np.broadcast_to(np.sqrt(seen + EPS), 6) / rate

    lr = 1.95 / eigh(hessian, np.diag(preconditioner(nu)))[0][-2]
    p = preconditioner(nu, lr=lr)
    values, vectors = eigh(hessian, np.diag(p))
    u = vectors[:, :-3:-1].T

    def settle(square):
        square = square if entries == 6 else np.sum(square, keepdims=True)[:entries]
        return (1 - DECAY) / DECAY * (square - nu)

    def drift(d_nu, dt, h=1e-6):
        ahead = preconditioner(nu + h * d_nu, h * dt, lr)
        return (ahead - preconditioner(nu - h * d_nu, -h * dt, lr)) / (2 * h)

    def ahead(x, dt):
        """What X (with dt = 0), or no X (dt = 1), adds to U (2P - H) U^T in 1/gamma."""
        sigma = u.T @ x @ u
        square = 4 * p**2 * np.diag(sigma)  # at the edge H u = 2 P u
        d_nu = settle(g**2) if dt else settle(square) - settle(0 * square)
        d_w = -(dt * g + 0.5 * np.einsum("abc,bc->a", third, sigma)) / p
        moved = 2 * np.diag(drift(d_nu, dt)) - np.einsum("abc,c->ab", third, d_w)
        return u @ moved @ u.T / GAMMA

    free = 2 * np.eye(2) - u @ hessian @ u.T + ahead(np.zeros((2, 2)), 1.0)
    basis = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0.5], [0.5, 0]]])
    # <E_i, B[E_j]>, and X = x_0 E_0 + x_1 E_1 + 2 x_2 E_2 for X = [[x_0, x_2], ...].
    form = np.array([[np.sum(a * ahead(b, 0.0)) for b in basis] for a in basis])
    np.testing.assert_allclose(form, form.T, atol=1e-7)
    x = cvxpy.Variable((2, 2), PSD=True)
    entries_of_x = cvxpy.hstack([x[0, 0], x[1, 1], 2 * x[0, 1]])
    quadratic = cvxpy.quad_form(entries_of_x, cvxpy.psd_wrap(0.5 * (form + form.T)))
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.trace(free @ x) + 0.5 * quadratic))
    problem.solve(solver="CLARABEL")
    sigma = u.T @ x.value @ u
    d_w = -(g + 0.5 * np.einsum("abc,bc->a", third, sigma)) / p
    spread = np.diag(hessian @ sigma @ hessian)
    predicted = float(loss(flat)) + 0.5 * np.sum(sigma * hessian)
    norm = np.sqrt(g @ g + np.sum(spread))
    return lr, u, d_w, settle(g**2 + spread), predicted, norm, values[-1]


# The one quick case has a second moment, a bias correction and a schedule.
QUICK = "rmsprop, bias-corrected, on a schedule"


@pytest.mark.parametrize(
    "name",
    [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_field_is_the_dense_one(name):
    optimizer, entries, schedule, corrected = CASES[name]
    # One second moment of zero, whose gradient is zero too.
    nu = np.array([0.5, 0.7, 0.0, 1.1, 1.3, 1.5])[3 * (entries == 1) :][:entries]
    lr, u, d_w, d_nu, predicted, norm, top = dense_central(
        nu, entries, schedule, corrected
    )
    assert top > 2.2
    flow = central(rj.dynamics(optimizer, bent), rank=2, gamma=GAMMA)
    lr = jnp.asarray(lr)
    y = jax.jit(lambda lr: flow.init(POINT, lr=lr, key=KEY))(lr)
    unravel = ravel_pytree(y.mean.slow)[1]
    mean = y.mean._replace(
        slow=unravel(jnp.asarray(nu)), clock=optax.tree.full_like(y.mean.clock, STEP)
    )
    rows = jax.vmap(ravel_pytree(POINT)[1])(jnp.asarray(u))
    y = y._replace(mean=mean, directions=rows)
    field = jax.jit(flow.vector_field)(STEP, y, lr)
    size = np.linalg.norm(d_w)
    np.testing.assert_allclose(
        ravel_pytree(field.mean.params)[0], d_w, rtol=1e-4, atol=1e-5 * size
    )
    np.testing.assert_allclose(
        ravel_pytree(field.mean.slow)[0], d_nu, rtol=1e-4, atol=1e-5
    )
    assert all(float(rate) == 1.0 for rate in jax.tree.leaves(field.mean.clock))
    # An exact eigenspace has nowhere to turn.
    np.testing.assert_allclose(ravel_pytree(field.directions)[0], 0.0, atol=1e-9)
    _, report = jax.jit(lambda y, lr: flow.observe(y, lr=lr))(y, lr)
    np.testing.assert_allclose(report["predicted_loss"], predicted, rtol=1e-4)
    np.testing.assert_allclose(report["predicted_grad_norm"], norm, rtol=1e-4)
    assert float(report["complementarity"]) < 1e-9


@pytest.mark.slow
def test_starts_at_the_moments_the_next_step_divides_by():
    rms = rj.dynamics(optax.rmsprop(0.01, DECAY, EPS), bent)
    begin = rj.warm_up(rms, POINT, 5)
    y = central(rms).init(begin, lr=None, key=KEY)
    after = lambda k: ravel_pytree(begin.at(k).slow)[0]
    expected = (after(0) + 2 * after(1) + after(2)) / 4
    np.testing.assert_allclose(ravel_pytree(y.mean.slow)[0], expected, rtol=1e-12)


@pytest.mark.slow
def test_lanes_with_and_without_an_edge_share_a_program():
    problem = rj.problems.digits_mlp(40, widths=(8,), dtype="float32")
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    begin = rj.warm_up(dynamics, problem.params, 20, lr=0.5)
    flow = central(dynamics)
    rates = jnp.array([0.2, 0.9, 1.4], jnp.float32)
    y = jax.vmap(lambda lr: flow.init(begin, lr=lr, key=KEY))(rates)

    @jax.jit
    def look(y, lr):
        ends, report = flow.observe(y, lr=lr)
        apart = jnp.max(jnp.std(ends["layers"][0]["bias"], 0))
        return flow.vector_field(0.0, y, lr), apart, report

    lanes = jax.vmap(look)(y, rates)
    assert {x.dtype for x in jax.tree.leaves(lanes)} == {jnp.dtype("float32")}
    assert float(lanes[1][0]) < 1e-7 and float(lanes[1][2]) > 1e-4
    assert float(lanes[2]["complementarity"].max()) < 1e-3
    for i in range(3):
        alone = look(lane(y, i), rates[i])
        size = float(optax.tree.norm(alone[0]))
        jax.tree.map(
            lambda a, b, i=i, size=size: np.testing.assert_allclose(
                a, b[i], rtol=1e-3, atol=1e-3 * size
            ),
            alone[:2],
            lanes[:2],
        )


@pytest.mark.slow
def test_directions_follow_the_top_eigenspace():
    problem = rj.problems.digits_mlp(40, widths=(8,))
    dynamics = rj.dynamics(optax.sgd(0.5), problem.loss)
    begin = rj.warm_up(dynamics, problem.params, 20)
    path = rj.integrate(central(dynamics, rank=2), begin, 40, every=40)
    truth = rj.hessian_eigenpairs(dynamics.loss, path.final.state.mean.params, 2)
    flat = jax.vmap(lambda v: ravel_pytree(v)[0])(truth.vectors)
    own = jax.vmap(lambda v: ravel_pytree(v)[0])(path.final.state.directions)
    own = own / jnp.linalg.norm(own, axis=1)[:, None]
    inside = jnp.linalg.norm(own @ flat.T, axis=1)
    np.testing.assert_allclose(inside, 1.0, atol=1e-3)


@pytest.mark.slow
def test_reference_problem():
    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd(0.6), problem.loss)
    begin = rj.warm_up(dynamics, problem.params, 20)
    metrics = [rj.edge_of_stability(dynamics)]
    run = rj.descend(dynamics, begin, 360, metrics=metrics)
    path = rj.integrate(central(dynamics), begin, 360, metrics=metrics)
    assert float(rj.compare(run, path).distance[240]) < 1.2 * 0.044
    np.testing.assert_allclose(path.metrics["sharpness_ratio"][80:], 1.0, atol=1e-3)
    assert float(path.metrics["complementarity"].max()) < 1e-8
    # Time averages over the run's bursts of oscillation, some 120 steps apart.
    late = slice(60, 360)
    mean = lambda values: float(np.mean(values[late]))
    assert mean(path.metrics["loss"]) < 0.97 * mean(run.metrics["mean_loss"])
    predicted = mean(path.metrics["predicted_loss"])
    np.testing.assert_allclose(predicted, mean(run.metrics["mean_loss"]), rtol=0.02)
    slope = jax.grad(problem.loss)
    squares = jax.vmap(lambda p: optax.tree.norm(slope(p), squared=True))(
        jax.tree.map(lambda ends: ends[:, 0], run.ends)
    )
    power = mean(path.metrics["predicted_grad_norm"] ** 2)
    np.testing.assert_allclose(power, mean(squares), rtol=0.15)
    # Without the oscillation it would be far less.
    centre = jax.vmap(lambda p: optax.tree.norm(slope(p), squared=True))(path.params)
    assert mean(centre) < 0.2 * power
