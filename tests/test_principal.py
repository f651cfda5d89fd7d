"""The principal flow is gradient descent at whole steps where the model is exact."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import order, runge_kutta

import rodjax as rj
from rodjax.flows import PrincipalState, gradient, igr, principal

FLOWS = {"principal": principal, "igr": igr, "gradient": gradient}
KEY = jax.random.key(0)
FINE = {"solver": diffrax.Dopri8(), "substeps": 16}
# Whole steps lie between those of the solver, whose interpolation is of a lower order.
ADAPTIVE = {
    "solver": diffrax.Dopri8(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-11, atol=1e-13),
}
# Descended, ended in one step, flipped (twice over), diverging, climbed, left alone.
PRODUCTS = np.array([0.3, 1.0, 1.5, 1.5, 2.3, -0.7, 0.0])
BOWL = rj.problems.quadratic(PRODUCTS, seed=3)
SGD = rj.dynamics(optax.sgd, BOWL.loss)
HESSIAN = jax.hessian(BOWL.loss)(BOWL.params)["w"]["w"]


def powers(spectrum, start, steps):
    """The iterates on a quadratic, from its eigenvalues times the learning rate."""
    return (1 - spectrum)[None] ** np.arange(steps + 1)[:, None] * start[None]


@pytest.mark.parametrize("options", [FINE, ADAPTIVE], ids=["fixed", "adaptive"])
def test_is_gradient_descent_on_a_quadratic(options):
    path = rj.integrate(principal(SGD), BOWL.params, 8, lr=1.0, **options)
    basis = np.linalg.eigh(HESSIAN)[1]
    order = np.argsort(np.argsort(PRODUCTS, kind="stable"))
    basis = basis[:, order]
    start = np.asarray(BOWL.params["w"]) @ basis
    exact = powers(PRODUCTS, start, 8) @ basis.T
    atol = 1e-12 if options is FINE else 1e-9
    np.testing.assert_allclose(path.params["w"], exact, rtol=0, atol=atol)
    # At whole steps it is real again.
    assert float(jnp.max(jnp.abs(path.final.state.imaginary["w"]))) < 1e-8


def test_field_in_closed_form_at_complex_states():
    """log(1 - eta H) times the complex state, eta at 1 and elsewhere."""
    real, imaginary = jax.random.normal(KEY, (2, 7))
    y = principal(SGD).init({"w": real}, lr=jnp.asarray(1.0), key=KEY)
    y = PrincipalState(y.mean, {"w": imaginary})
    values, vectors = np.linalg.eigh(HESSIAN)
    field = jax.jit(principal(SGD).vector_field)
    for lr in (0.4, 0.9, 1.7):
        dy = field(0.0, y, jnp.asarray(lr))
        log = np.log((1 - lr * values).astype(complex))
        exact = vectors @ (log * (vectors.T @ (real + 1j * imaginary)))
        np.testing.assert_allclose(dy.mean.params["w"], exact.real, atol=1e-11)
        np.testing.assert_allclose(dy.imaginary["w"], exact.imag, atol=1e-11)


def test_float32():
    spectrum = PRODUCTS[[0, 2, 4, 5]]
    problem = rj.problems.quadratic(spectrum, seed=1, dtype="float32")
    flow = principal(rj.dynamics(optax.sgd, problem.loss))
    lr = jnp.float32(1.0)
    solve = lambda w: runge_kutta(flow, w, 6, lr=lr, substeps=64)
    path = jax.jit(solve)(problem.params)
    run = rj.descend(flow.dynamics, problem.params, 6, lr=1.0)
    assert {x.dtype for x in jax.tree.leaves(path)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(path.mean.params["w"], run.ends["w"][1:, 0], atol=2e-4)


def solutions(problem, starts, rates, steps):
    """name -> points [case, step, coordinate] of gradient descent and of the flows."""
    dynamics = rj.dynamics(optax.sgd, problem.loss)

    def every(start, lr):
        run = rj.descend(dynamics, start, steps, lr=lr)
        found = {"gd": jax.tree.map(lambda e: e[:, 0], run.ends)}
        for name, build in FLOWS.items():
            flow = build(dynamics)
            path = runge_kutta(flow, start, steps, lr=lr, substeps=64)
            path = flow.centre(path).params
            found[name] = jax.tree.map(
                lambda w, x: jnp.concatenate([w[None], x]), start, path
            )
        return found

    found = jax.jit(jax.vmap(every))(starts, rates)
    flat = lambda tree: np.stack([np.asarray(x) for x in jax.tree.leaves(tree)], -1)
    return {name: flat(points) for name, points in found.items()}


# Cosine: at its maximum; in between; at its minimum, beyond eta = 2; small rates.
TOP, BETWEEN, BOTTOM, SMALL = slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)
STARTS = [1e-8, 1e-8, 0.1, 0.5, 0.5, np.pi + 1e-6, np.pi + 1e-6, 0.7, 0.7, 0.7]
RATES = [0.5, 1.2, 0.5, 0.5, 1.5, 2.2, 2.6, 0.01, 0.02, 0.04]


@pytest.fixture(scope="module")
def cosine():
    problem = rj.problems.cosine()
    return solutions(problem, jnp.array(STARTS), jnp.array(RATES), 14)


@pytest.fixture(scope="module")
def banana():
    rates = jnp.array([0.05, 0.1, 0.16, 0.2, 0.4, 0.7, 0.21])
    start = jax.tree.map(lambda x: jnp.full(7, x), rj.problems.banana().params)
    # The last close to the minimum, whose edge is at 0.17.
    off = {"x": 1 + 1e-6, "y": 1 - 1e-6}
    starts = jax.tree.map(lambda x, v: x.at[-1].set(v), start, off)
    return solutions(rj.problems.banana(), starts, rates, 14)


def test_leaves_a_maximum_by_the_factor_of_gradient_descent(cosine):
    found = {name: points[TOP, :8, 0] / 1e-8 for name, points in cosine.items()}
    for row, eta in enumerate(RATES[TOP]):
        exact = (1 + eta) ** np.arange(8)
        np.testing.assert_allclose(found["principal"][row], exact, rtol=1e-7)
        np.testing.assert_allclose(found["gd"][row], exact, rtol=1e-7)
        assert found["gradient"][row, -1] > 1.8 * exact[-1]
        assert found["igr"][row, -1] < 0.9 * exact[-1]


def test_leaves_a_minimum_beyond_the_edge(cosine):
    found = {name: points[BOTTOM, :, 0] - np.pi for name, points in cosine.items()}
    for row, eta in enumerate(RATES[BOTTOM]):
        exact = 1e-6 * (1 - eta) ** np.arange(15)
        np.testing.assert_allclose(found["principal"][row], exact, rtol=1e-5)
        np.testing.assert_allclose(found["gd"][row], exact, rtol=1e-5)
        for name in ("gradient", "igr"):
            assert np.all(np.diff(found[name][row])[:4] < 0)
            assert np.all(np.abs(found[name][row, 8:]) < 1e-10)


def distances(found, cases):
    """name -> [case], the mean distance to the iterates of gradient descent."""
    iterates = found["gd"][cases]
    return {
        name: np.linalg.norm(found[name][cases] - iterates, axis=-1).mean(1)
        for name in FLOWS
    }


@pytest.mark.parametrize("name, cases", [("cosine", BETWEEN), ("banana", slice(0, 4))])
def test_is_closest_to_the_iterates(name, cases, request):
    mean = distances(request.getfixturevalue(name), cases)
    assert np.all(mean["principal"] < 0.6 * mean["igr"]), mean
    assert np.all(mean["principal"] < 0.6 * mean["gradient"]), mean


def test_order_of_a_step(cosine):
    """3, as of IGR: the third derivative, which IGR lacks too, is not in it."""
    points = {name: points[SMALL, 1, 0] for name, points in cosine.items()}
    for name, power in {"principal": 3, "igr": 3, "gradient": 2}.items():
        errors = np.abs(points[name] - points["gd"])
        assert abs(order(RATES[SMALL], errors) - power) < 0.1, (name, errors)
    # What is left is eta^3 T[g, g] / 12: T = sin and g = -sin at 0.7.
    left = 0.01**3 * np.sin(0.7) ** 3 / 12
    np.testing.assert_allclose(
        np.abs(points["principal"] - points["gd"])[0], left, rtol=0.05
    )


def test_diverges_where_gradient_descent_does(banana):
    far = {
        name: ~np.all(np.abs(points[4:6, -1]) < 1e6, axis=-1)
        for name, points in banana.items()
    }
    assert np.all(far["gd"]) and np.all(far["principal"])
    assert not np.any(far["igr"]) and not np.any(far["gradient"])
    # Above the edge of the minimum as gradient descent leaves it.
    near = {name: points[-1] - 1.0 for name, points in banana.items()}
    np.testing.assert_allclose(near["principal"], near["gd"], rtol=1e-3)
    size = np.linalg.norm(near["gd"], axis=-1)
    assert size[-1] > 100 * size[0]
    for name in ("igr", "gradient"):
        assert np.linalg.norm(near[name][-1]) < size[0]


def test_escapes_a_strict_saddle():
    """A rotated saddle of curvatures 2.4 and -0.5, the wall flipping and descended."""
    turn = jnp.array([[0.8, 0.6], [-0.6, 0.8]])

    def loss(w):
        wall, along = turn @ w
        return wall**2 - 0.25 * along**2 + 0.1 * along**4

    begin = turn.T @ jnp.array([0.1, 1e-5])
    dynamics = rj.dynamics(optax.sgd(0.8), loss)
    flow = principal(dynamics)
    solve = lambda w: runge_kutta(flow, w, 14, lr=None, substeps=64).mean.params
    path = jax.jit(solve)(begin) @ turn.T
    exact = powers(0.8 * np.array([2.0, -0.5]), np.array([0.1, 1e-5]), 14)
    np.testing.assert_allclose(path, exact[1:], rtol=1e-3, atol=1e-9)


def test_schedules():
    """On a quadratic by the rates of the steps, of both flows."""
    rates = optax.linear_schedule(0.9, 0.4, 10)
    spectrum = np.array([0.9, 0.5, -0.3])
    problem = rj.problems.quadratic(spectrum)
    dynamics = rj.dynamics(optax.sgd(rates), problem.loss)
    each = np.array([[1 - float(rates(t)) * x for x in spectrum] for t in range(8)])
    exact = np.asarray(problem.params["w"])[None] * np.cumprod(each, 0)
    for rank in (None, 3):
        flow = principal(dynamics, rank=rank)
        solve = lambda w, flow=flow: runge_kutta(flow, w, 8, lr=None).mean.params["w"]
        w = jax.jit(solve)(problem.params)
        # Without the first half step, in which the flow's rate does not change yet.
        np.testing.assert_allclose(w / w[:1], exact / exact[:1], rtol=0.01)


MOMENTS = {
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "clipped": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "signs": optax.sign_sgd,
    "decayed": lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", MOMENTS)
def test_refuses_other_optimizers(name, rank):
    flow = principal(rj.dynamics(MOMENTS[name], BOWL.loss), rank=rank)
    message = r"principal models gradient descent only.*stable, rod, modulated or edge"
    with pytest.raises(ValueError, match=message):
        flow.init(BOWL.params, lr=jnp.asarray(0.1), key=KEY)


def real_inside(w):
    return jnp.sum(w.astype("float64") ** 2)


LOSSES = {
    "modulus": (lambda w: jnp.sum(jnp.abs(w) ** 2), "not analytic"),
    "norm": (lambda w: jnp.linalg.norm(w) ** 2, "not analytic"),
    "conjugate": (lambda w: jnp.vdot(w, w * w), "not analytic"),
    "cast": (real_inside, "not analytic"),
    "erf": (lambda w: jnp.sum(jax.scipy.special.erf(w)), "does not take complex"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_losses_that_are_not_analytic(name):
    loss, message = LOSSES[name]
    dynamics = rj.dynamics(optax.sgd, loss)
    with pytest.raises(ValueError, match=rf"principal: the loss .*{message}.*rank=k"):
        principal(dynamics).init(jnp.ones(3), lr=jnp.asarray(0.1), key=KEY)
    # The approximation is real and does not mind.
    principal(dynamics, rank=1).init(jnp.ones(3), lr=jnp.asarray(0.1), key=KEY)


def test_a_loss_of_traced_data_is_served():
    def begin(scale):
        dynamics = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(scale * w**2))
        return principal(dynamics).init(jnp.ones(2), lr=None, key=KEY).mean.params

    np.testing.assert_array_equal(jax.jit(begin)(jnp.ones(2)), 1.0)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_is_checked(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
        principal(SGD, rank=rank)
