"""The rod flow: closed forms, the published equation, bundles and the dense oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import field, heun, order

import rodjax as rj
from rodjax.flows import RodState, rod

KEY = jax.random.key(0)
ETA = 0.3


def rods(rank, size=0.2, dims=3, seed=1):
    return size * jax.random.normal(jax.random.key(seed), (rank, dims))


def at(flow, w, u, lr=ETA):
    """The field at centre w with rods u: the rates of both."""
    mean = flow.dynamics.init(w, lr=lr)
    y = RodState(mean, (u, *mean.phase[1:]))
    dy = field(flow, y, jnp.asarray(lr))
    return dy.mean.params, dy.extent[0]


def dense_field(flow, w, sigma, lr=ETA):
    y = RodState(flow.dynamics.init(w, lr=lr), sigma)
    dy = field(flow, y, jnp.asarray(lr))
    return dy.mean.params, dy.extent


def sigma_rate(u, du):
    """d(U U^T)/dt with the columns of U as rows."""
    return du.T @ u + u.T @ du


# --- scalars, in closed form ---------------------------------------------------


SHARPNESS = 2.5
WELL = rj.dynamics(optax.sgd, lambda w: 0.5 * SHARPNESS * jnp.sum(w**2))
SCALAR = rod(WELL)


@pytest.mark.parametrize("product", [0.5, 1.0, 1.9, 2.0, 2.1, 3.0])
@pytest.mark.parametrize("half", [1e-9, 0.3])
def test_scalar_growth_is_closed_form(product, half):
    """Sigma' / Sigma = eta^2 S^2 / 2 - 2 at the minimum, whatever the extent."""
    u = jnp.full((1, 1), half)
    _, du = at(SCALAR, jnp.zeros(1), u, product / SHARPNESS)
    rate = float(sigma_rate(u, du)[0, 0] / half**2)
    np.testing.assert_allclose(rate, 0.5 * product**2 - 2.0, rtol=1e-6, atol=1e-7)


def test_quartic_fixed_point():
    sharpness, quartic, lr = 2.5, 0.8, 1.0
    well = rj.problems.quartic_well(sharpness=sharpness, quartic=quartic, initial=0.2)
    flow = rod(rj.dynamics(optax.sgd, well.loss))
    y = flow.init(well.params, lr=lr, key=KEY)
    y = heun(flow)(y, jnp.asarray(lr), 4 * 80)
    exact = sharpness / quartic - 2.0 / (lr * quartic)
    np.testing.assert_allclose(y.extent[0][0] ** 2, exact, rtol=1e-8)
    np.testing.assert_allclose(y.mean.params, 0.0, atol=1e-6)


# --- the published equation for GD -----------------------------------------------


HESSIAN = jnp.array([[3.0, 0.5, 0.0], [0.5, 2.0, -0.3], [0.0, -0.3, 1.0]])
bowl = lambda w: 0.5 * w @ HESSIAN @ w
bent = lambda w: bowl(w) + 0.3 * jnp.sum(w**4) + jnp.sin(w[0] * w[1])
BOWL, BENT = rj.dynamics(optax.sgd, bowl), rj.dynamics(optax.sgd, bent)
W = jnp.array([0.6, -0.4, 0.3])


def published(loss, w, u, eta):
    """arXiv 2602.01480, with Hessians: the rates of the centre and of Sigma."""
    ends = w + u, w - u
    g = [jax.grad(loss)(x) for x in ends]
    h = [jax.hessian(loss)(x) for x in ends]
    centre = -eta / 2 * (g[0] + g[1]) - eta**2 / 8 * (h[0] + h[1]) @ (g[0] + g[1])
    outer = jnp.outer(g[0], g[0]) + jnp.outer(g[1], g[1])
    return centre, eta**2 / 4 * outer - 2.0 * jnp.outer(u, u)


def difference(dynamics, eta, loss):
    """Of the centre's rate and of Sigma's from the published ones."""
    u = rods(1)[0]
    centre, sigma = published(loss, W, u, eta)
    flow = rod(dynamics, dense=True)
    ours, grow = dense_field(flow, W, jnp.outer(u, u), eta)
    return float(jnp.linalg.norm(ours - centre)), float(jnp.linalg.norm(grow - sigma))


@pytest.mark.parametrize("eta", [0.1, 0.7])
def test_published_form_on_a_quadratic(eta):
    assert max(difference(BOWL, eta, bowl)) < 1e-13


def test_published_form_in_general():
    """The correction without derivatives is theirs up to O(eta^3)."""
    etas = [0.04, 0.02, 0.01]
    apart = [difference(BENT, eta, bent) for eta in etas]
    assert abs(order(etas, [centre for centre, _ in apart]) - 3) < 0.2
    assert max(sigma for _, sigma in apart) < 1e-13


# --- factors and the dense oracle ------------------------------------------------


def rates(rank, w=W, lr=ETA):
    """Sigma' from a factor of this rank, and the dense right-hand side M there."""
    u = rods(rank)
    centre, du = at(rod(BENT, rank=rank), w, u, lr)
    # M of these very rods, by its definition.
    sides = [
        jax.vmap(lambda x: -lr * jax.grad(bent)(x))(w[None] + side * rank**0.5 * u)
        for side in (1.0, -1.0)
    ]
    s = 0.5 * jnp.mean(sides[0] + sides[1], 0)
    d = (sides[0] - sides[1]) / (2.0 * rank**0.5)
    m = 0.5 * (jnp.outer(s, s) + d.T @ d) - 2.0 * u.T @ u
    return u, centre, sigma_rate(u, du), m


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_factor_follows_the_projection(rank):
    """U' U^T + U U'^T is M projected to the tangent space of rank r."""
    u, _, ours, m = rates(rank)
    off = jnp.eye(3) - jnp.linalg.pinv(u) @ u
    projected = m - off @ m @ off
    scale = float(jnp.linalg.norm(m))
    assert float(jnp.linalg.norm(ours - projected)) < 1e-5 * scale
    if rank == 3:  # nothing is projected out
        assert float(jnp.linalg.norm(ours - m)) < 1e-5 * scale
    else:
        assert float(jnp.linalg.norm(ours - m)) > 1e-3 * scale


def test_dense_of_a_bundle_is_its_factor():
    """On a quadratic, where the choice of the rods of Sigma does not matter."""
    u = rods(3)
    dense = rod(BOWL, dense=True, rank=3)
    centre, sigma = dense_field(dense, W, u.T @ u)
    ours, du = at(rod(BOWL, rank=3), W, u)
    np.testing.assert_allclose(ours, centre, atol=1e-12)
    scale = float(jnp.linalg.norm(sigma))
    assert float(jnp.linalg.norm(sigma_rate(u, du) - sigma)) < 1e-5 * scale


def test_dense_trajectory_is_the_full_factor():
    full, dense = rod(BOWL, rank=3), rod(BOWL, rank=3, dense=True)
    u, lr = rods(3), jnp.asarray(0.55)  # just below the edge, 2 / 3.2
    mean = BOWL.init(W, lr=lr)
    factor = heun(full, 100)(RodState(mean, (u, *mean.phase[1:])), lr, 800)
    sigma = heun(dense, 100)(RodState(mean, u.T @ u), lr, 800)
    np.testing.assert_allclose(factor.mean.params, sigma.mean.params, atol=1e-9)
    rows = factor.extent[0]
    np.testing.assert_allclose(rows.T @ rows, sigma.extent, rtol=2e-4, atol=1e-12)


@pytest.mark.parametrize("rank, dense", [(1, False), (2, False), (1, True)])
def test_turns_with_the_parameters(rank, dense):
    q = jax.random.orthogonal(KEY, 3)
    turned = rj.dynamics(optax.sgd, lambda v: bent(q.T @ v))
    u = rods(rank)
    solve = dense_field if dense else at
    build = partial(rod, rank=rank, dense=dense)
    ours = solve(build(BENT), W, u.T @ u if dense else u)
    theirs = solve(build(turned), q @ W, q @ u.T @ u @ q.T if dense else u @ q.T)
    np.testing.assert_allclose(q @ ours[0], theirs[0], atol=1e-12)
    back = q @ ours[1] @ q.T if dense else ours[1] @ q.T
    np.testing.assert_allclose(back, theirs[1], atol=1e-9)


def test_starts_as_the_rod_of_the_window():
    window = rj.warm_up(BENT, W, steps=5, lr=ETA)
    y = rod(BENT).init(window, lr=ETA, key=KEY)
    a, b = window.at(0).params, window.at(1).params
    ends = rod(BENT).observe(y, lr=None)[0]
    np.testing.assert_allclose(ends, jnp.stack([b, a]), atol=1e-14)
    sigma = rod(BENT, dense=True).init(window, lr=ETA, key=KEY).extent
    np.testing.assert_allclose(sigma, jnp.outer(b - a, b - a) / 4.0, atol=1e-15)


# --- digits ------------------------------------------------------------------------


@pytest.mark.slow
def test_bundle_holds_the_edge_on_digits():
    problem = rj.problems.digits_mlp()
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    window = rj.warm_up(dynamics, problem.params, steps=20, lr=0.6)
    ratio = {}
    for rank in (1, 3):
        path = rj.integrate(
            rod(dynamics, rank=rank),
            window,
            steps=420,
            lr=0.6,
            every=10,
            metrics=[rj.edge_of_stability(dynamics)],
            keep=lambda params: None,
        )
        ratio[rank] = float(np.median(path.metrics["sharpness_ratio"][-14:]))
    assert abs(ratio[3] - 1.0) < 0.03, ratio
    assert ratio[1] > 1.2, ratio


def test_orders_that_there_are():
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        rod(BENT, order=3)
