"""The covariance flow: Sigma on quadratics, its free energy, its cost and its scope."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import field, heun
from scipy.linalg import expm

import rodjax as rj
from rodjax.flows import CovarianceState, covariance

KEY = jax.random.key(0)
ETA = 0.55
HESSIAN = np.array([[3.0, 0.5, 0.0], [0.5, 2.0, -0.3], [0.0, -0.3, 1.0]])
VALUES, VECTORS = np.linalg.eigh(HESSIAN)
BOWL = rj.dynamics(optax.sgd(ETA), lambda w: 0.5 * w @ jnp.asarray(HESSIAN) @ w)
W = jnp.array([0.6, -0.4, 0.3])


def at(dynamics, w, rows, lr=None):
    return CovarianceState(dynamics.init(w, lr=lr), jnp.asarray(rows))


def solve(flow, y, steps, parts=64):
    """The state after so many steps."""
    return heun(flow, substeps=parts)(y, None, steps * parts)


def dense(h, sigma, eta, t):
    """Sigma after time t of -eta (H S + S H) + eta^2 H S H, by one exponential."""
    one = np.eye(len(h))
    both = -eta * (np.kron(h, one) + np.kron(one, h)) + eta**2 * np.kron(h, h)
    return (expm(t * both) @ sigma.reshape(-1)).reshape(sigma.shape)


def sigma_of(y):
    return np.asarray(y.factor.T @ y.factor)


# --- Sigma on quadratics -------------------------------------------------------------


def test_commuting_sigma_is_closed_form():
    """Eigenvalues multiply by exp((-2 eta l + eta^2 l^2) t), on both sides of 2/eta."""
    lr = 2.0 / (0.9 * VALUES[-1])
    dynamics = rj.dynamics(optax.sgd(lr), BOWL.loss)
    sizes = np.array([0.2, 0.05, 1e-3])
    y = at(dynamics, W, sizes[:, None] * VECTORS.T)
    end = solve(covariance(dynamics, floor=0.0), y, 4)
    product = lr * VALUES
    assert product[0] < 2 < product[-1]
    factors = sizes**2 * np.exp((product**2 - 2.0 * product) * 4)
    exact = (VECTORS * factors) @ VECTORS.T
    np.testing.assert_allclose(sigma_of(end), exact, rtol=1e-3, atol=1e-9)
    oracle = dense(HESSIAN, (VECTORS * sizes**2) @ VECTORS.T, lr, 4.0)
    np.testing.assert_allclose(sigma_of(end), oracle, rtol=1e-3, atol=1e-9)
    # On a quadratic the centre does not feel it.
    centre = expm(-4.0 * lr * HESSIAN) @ np.asarray(W)
    np.testing.assert_allclose(end.mean.params, centre, rtol=1e-3, atol=1e-5)


def test_rank_of_one_follows_a_commuting_direction():
    rows = 0.1 * VECTORS[:, 1:2].T
    end = solve(covariance(BOWL, rank=1), at(BOWL, W, rows), 3)
    oracle = dense(HESSIAN, rows.T @ rows, ETA, 3.0)
    np.testing.assert_allclose(sigma_of(end), oracle, rtol=1e-3, atol=1e-12)


def rates(rows):
    """dSigma/dt: the flow's, from its factor, and the equation's."""
    dy = field(covariance(BOWL, floor=0.0), at(BOWL, W, rows))
    rate, h, sigma = np.asarray(dy.factor), HESSIAN, rows.T @ rows
    ours = rate.T @ rows + rows.T @ rate
    equation = -ETA * (h @ sigma + sigma @ h) + ETA**2 * h @ sigma @ h
    return ours, equation, sigma


def test_differs_by_a_double_commutator():
    """eta^2/2 [H, [H, Sigma]]: nothing where they commute, else bounded by it."""
    commutator = lambda a, b: a @ b - b @ a
    rows = np.asarray(0.2 * jax.random.normal(KEY, (2, 3)))
    ours, equation, sigma = rates(rows)
    inner = commutator(HESSIAN, sigma)
    exact = 0.5 * ETA**2 * commutator(HESSIAN, inner)
    np.testing.assert_allclose(ours - equation, exact, atol=1e-14)
    apart = np.linalg.norm(ours - equation)
    bound = ETA**2 * VALUES[-1] * np.linalg.norm(inner)
    assert 1e-3 * bound < apart < bound
    ours, equation, _ = rates(0.2 * VECTORS.T[1:])
    np.testing.assert_allclose(ours, equation, atol=1e-14)


def test_forgets_a_sigma_that_does_not_commute():
    """Above the edge it comes to the top eigenvector: as does the equation's."""
    lr = 2.2 / VALUES[-1]
    dynamics = rj.dynamics(optax.sgd(lr), BOWL.loss)
    rows = np.asarray(1e-3 * jax.random.normal(KEY, (2, 3)))
    end = sigma_of(
        solve(covariance(dynamics, rank=2, floor=0.0), at(dynamics, W, rows), 30)
    )
    oracle = dense(HESSIAN, rows.T @ rows, lr, 30.0)
    top = np.outer(VECTORS[:, -1], VECTORS[:, -1])
    for sigma in (end, oracle):
        np.testing.assert_allclose(sigma / np.trace(sigma), top, atol=1e-5)
    # Along the eigenvector both grow alike, from the same start.
    np.testing.assert_allclose(np.trace(end), np.trace(oracle), rtol=1e-2)


@pytest.mark.parametrize("floor, relative", [(None, 2.0**-52), (1e-5, 1e-5)])
def test_floor_holds(floor, relative):
    """Where the push 2 (floor / |v| - 1) balances -x + x^2/2 at x = eta l = 1."""
    slopes = jnp.array([1.0, 1e-9])
    dynamics = rj.dynamics(optax.sgd(1.0), lambda w: 0.5 * w @ (slopes * w))
    y = at(dynamics, jnp.array([0.0, 2.0]), [[1e-3, 0.0]])
    end = solve(covariance(dynamics, rank=1, floor=floor), y, 100, parts=4)
    np.testing.assert_allclose(end.factor, [[1.6 * relative, 0.0]], rtol=1e-6)


# --- the centre ------------------------------------------------------------------


BENT = lambda w: (
    0.5 * w @ jnp.asarray(HESSIAN) @ w + 0.3 * jnp.sum(w**4) + jnp.sin(w[0] * w[1])
)


@pytest.mark.parametrize("rank", [1, 2])
def test_centre_descends_the_free_energy(rank):
    dynamics = rj.dynamics(optax.sgd(ETA), BENT)
    rows = np.asarray(0.3 * jax.random.normal(KEY, (rank, 3)))
    sigma = jnp.asarray(rows.T @ rows)
    energy = lambda w: BENT(w) + 0.5 * jnp.sum(jax.hessian(BENT)(w) * sigma)
    dy = field(covariance(dynamics, rank=rank), at(dynamics, W, rows))
    exact = -ETA * jax.jit(jax.grad(energy))(W)
    np.testing.assert_allclose(dy.mean.params, exact, rtol=1e-12)
    plain = -ETA * jax.grad(BENT)(W)
    assert np.linalg.norm(exact - plain) > 0.1 * np.linalg.norm(plain)


def test_rate_follows_a_schedule():
    """Once the clock has moved, both the centre and Sigma see the rate of that step."""
    schedule = optax.linear_schedule(0.0, 0.4, 10)
    rows = 0.1 * VECTORS.T[-1:]
    fields = []
    for optimizer in (optax.sgd(schedule), optax.sgd(0.2)):
        dynamics = rj.dynamics(optimizer, BENT)
        y = at(dynamics, W, rows)
        clock = jax.tree.map(lambda c: c + 5.0, y.mean.clock)
        y = y._replace(mean=y.mean._replace(clock=clock))
        dy = field(covariance(dynamics, rank=1), y)
        fields.append((dy.mean.params, dy.factor))
    for ours, exact in zip(*fields, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-12)


def test_ends_have_the_covariance():
    rows = 0.2 * jax.random.normal(KEY, (2, 3))
    ends, report = covariance(BOWL).observe(at(BOWL, W, rows), lr=None)
    np.testing.assert_allclose(jnp.mean(ends, 0), W, rtol=1e-14)
    apart = np.asarray(ends - W[None])
    np.testing.assert_allclose(apart.T @ apart / 4, rows.T @ rows, rtol=1e-12)
    assert report == {}


# --- start, scope and cost ---------------------------------------------------------


def test_starts_from_the_windows_alternation():
    window = rj.warm_up(BOWL, W, steps=5)
    y = covariance(BOWL, rank=2).init(window, lr=None, key=KEY)
    np.testing.assert_array_equal(y.mean.params, rj.midpoint(window).params)
    np.testing.assert_allclose(y.factor[0], rj.alternating(window).params, rtol=1e-12)
    tiny = 2.0**-52 * np.linalg.norm(y.mean.params)
    np.testing.assert_allclose(np.linalg.norm(y.factor[1]), tiny, rtol=1e-12)


def test_rank_is_at_most_the_number_of_parameters():
    begin = {"a": W[:2], "b": W[2]}
    dynamics = rj.dynamics(optax.sgd(0.1), lambda p: jnp.sum(p["a"] ** 2) * p["b"])
    y = covariance(dynamics, rank=5).init(begin, lr=None, key=KEY)
    shapes = jax.tree.map(jnp.shape, y.factor)
    assert shapes == {"a": (3, 2), "b": (3,)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.rmsprop(0.1),
        optax.adam(0.1),
        optax.sign_sgd(0.1),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    ],
    ids=["momentum", "rmsprop", "adam", "signs", "clipping", "decay"],
)
def test_refuses_other_optimizers(optimizer):
    flow = covariance(rj.dynamics(optimizer, BENT))
    message = "covariance models gradient descent only.*use rodjax.flows.stable, rod"
    with pytest.raises(ValueError, match=message) as caught:
        flow.init(W, lr=None, key=KEY)
    assert all(name in str(caught.value) for name in ("modulated", "edge", "central"))


def counting():
    """A loss whose derivatives count themselves at run time, one batch entry each."""
    counts = {"gradient": 0, "product": 0, "third": 0}

    def count(kind, x):
        tick = lambda _: counts.__setitem__(kind, counts[kind] + 1)
        jax.debug.callback(tick, x[0])

    slope, bent = jax.grad(BENT), lambda w, v: rj.hvp(BENT, w, v)

    @jax.custom_jvp
    def product(w, v):
        count("product", v)
        return bent(w, v)

    @product.defjvp
    def _(primals, tangents):
        (w, v), (dw, dv) = primals, tangents
        count("third", dw)
        return bent(w, v), rj.third_derivative(BENT, w, v, dw) + bent(w, dv)

    @jax.custom_jvp
    def gradient(w):
        count("gradient", w)
        return slope(w)

    @gradient.defjvp
    def _(primals, tangents):
        return slope(*primals), product(*primals, *tangents)

    @jax.custom_jvp
    def loss(w):
        return BENT(w)

    @loss.defjvp
    def _(primals, tangents):
        return BENT(*primals), jnp.vdot(gradient(*primals), *tangents)

    return loss, counts


@pytest.mark.parametrize("rank", [1, 3])
def test_differentiations_are_those_counted(rank):
    loss, counts = counting()
    dynamics = rj.dynamics(optax.sgd(ETA), loss)
    flow = covariance(dynamics, rank=rank)
    rows = 0.2 * jax.random.normal(KEY, (rank, 3))
    y = at(dynamics, W, rows)
    dy = field(flow, y)
    jax.effects_barrier()
    assert counts == {"gradient": 1, "product": 2 * rank, "third": rank}
    assert sum(counts.values()) == flow.evaluations + flow.products
    plain = covariance(rj.dynamics(optax.sgd(ETA), BENT), rank=rank)
    exact = field(plain, y)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(same, (dy.mean.params, dy.factor), (exact.mean.params, exact.factor))
