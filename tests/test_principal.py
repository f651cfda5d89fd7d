"""The principal flow is gradient descent at whole steps where the model is exact."""

from functools import lru_cache, partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.flows import gradient, igr, principal
from rodjax.flows.principal import PrincipalState

FLOWS = {"principal": principal, "igr": igr, "gradient": gradient}
KEY = jax.random.key(0)
FINE = {"solver": diffrax.Dopri8(), "substeps": 16}
ADAPTIVE = {
    "solver": diffrax.Dopri8(),
    "controller": diffrax.PIDController(rtol=1e-9, atol=1e-11),
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
    assert float(jnp.max(jnp.abs(path.final.imaginary["w"]))) < 1e-8


def test_field_in_closed_form_at_complex_states():
    """log(1 - eta H) times the complex state, eta at 1 and elsewhere."""
    real, imaginary = jax.random.normal(KEY, (2, 7))
    y = principal(SGD).init({"w": real}, jnp.asarray(1.0), KEY)
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
    path = rj.integrate(flow, problem.params, 6, lr=1.0, substeps=40)
    run = rj.descend(flow.dynamics, problem.params, 6, lr=1.0)
    assert path.params["w"].dtype == path.final.imaginary["w"].dtype == jnp.float32
    np.testing.assert_allclose(path.params["w"], run.ends["w"][:, 0], atol=2e-3)


def flat(tree):
    return np.stack([np.asarray(x) for x in jax.tree.leaves(tree)], -1)


def solutions(problem, starts, rates, steps):
    """name -> ([case, step, coordinate], [case] divergence), GD's iterates first."""
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    run = jax.vmap(lambda w, lr: rj.descend(dynamics, w, steps, lr=lr))(starts, rates)
    found = {"gd": (flat(jax.tree.map(lambda e: e[:, :, 0], run.ends)), run)}
    for name, flow in FLOWS.items():
        solve = partial(rj.integrate, flow(dynamics), steps=steps, **FINE)
        path = jax.vmap(lambda w, lr, solve=solve: solve(w, lr=lr))(starts, rates)
        found[name] = (flat(path.params), path)
    return {
        name: (points, ~np.isnan(path.diverged_at))
        for name, (points, path) in found.items()
    }


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
    found = {name: points[TOP, :8, 0] / 1e-8 for name, (points, _) in cosine.items()}
    for row, eta in enumerate(RATES[TOP]):
        exact = (1 + eta) ** np.arange(8)
        np.testing.assert_allclose(found["principal"][row], exact, rtol=1e-7)
        np.testing.assert_allclose(found["gd"][row], exact, rtol=1e-7)
        assert found["gradient"][row, -1] > 1.8 * exact[-1]
        assert found["igr"][row, -1] < 0.8 * exact[-1]


def test_leaves_a_minimum_beyond_the_edge(cosine):
    found = {n: points[BOTTOM, :, 0] - np.pi for n, (points, _) in cosine.items()}
    for row, eta in enumerate(RATES[BOTTOM]):
        exact = 1e-6 * (1 - eta) ** np.arange(15)
        np.testing.assert_allclose(found["principal"][row], exact, rtol=1e-5)
        np.testing.assert_allclose(found["gd"][row], exact, rtol=1e-5)
        for name in ("gradient", "igr"):
            assert np.all(np.diff(found[name][row]) < 0)


def distances(found, cases):
    """name -> [case], the mean distance to the iterates of gradient descent."""
    iterates = found["gd"][0][cases]
    return {
        name: np.linalg.norm(found[name][0][cases] - iterates, axis=-1).mean(1)
        for name in FLOWS
    }


@pytest.mark.parametrize("name, cases", [("cosine", BETWEEN), ("banana", slice(0, 4))])
def test_is_closest_to_the_iterates(name, cases, request):
    mean = distances(request.getfixturevalue(name), cases)
    assert np.all(mean["principal"] < 0.6 * mean["igr"]), mean
    assert np.all(mean["principal"] < 0.6 * mean["gradient"]), mean


def test_order_of_a_step(cosine):
    """3, as of IGR: the third derivative, which IGR lacks too, is not in it."""
    points = {name: points[SMALL, 1, 0] for name, (points, _) in cosine.items()}
    for name, order in {"principal": 3, "igr": 3, "gradient": 2}.items():
        errors = np.abs(points[name] - points["gd"])
        slope = np.polyfit(np.log(RATES[SMALL]), np.log(errors), 1)[0]
        assert abs(slope - order) < 0.1, (name, errors)
    # What is left is eta^3 T[g, g] / 12: T = sin and g = -sin at 0.7.
    left = 0.01**3 * np.sin(0.7) ** 3 / 12
    np.testing.assert_allclose(
        np.abs(points["principal"] - points["gd"])[0], left, rtol=0.05
    )


def test_diverges_where_gradient_descent_does(banana):
    diverged = {name: away[4:6].tolist() for name, (_, away) in banana.items()}
    assert diverged["gd"] == diverged["principal"] == [True, True]
    assert diverged["igr"] == diverged["gradient"] == [False, False]
    # Above the edge of the minimum as gradient descent leaves it.
    near = {name: points[-1] - 1.0 for name, (points, _) in banana.items()}
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
    path = rj.integrate(principal(dynamics), begin, 14, **FINE).params @ turn.T
    exact = powers(0.8 * np.array([2.0, -0.5]), np.array([0.1, 1e-5]), 14)
    np.testing.assert_allclose(path, exact, rtol=1e-3, atol=1e-9)


def test_schedules():
    """On a quadratic by the rates of the steps, of both flows."""
    rates = optax.linear_schedule(0.9, 0.4, 10)
    spectrum = np.array([0.9, 0.5, -0.3])
    problem = rj.problems.quadratic(spectrum)
    dynamics = rj.dynamics(optax.sgd(rates), problem.loss)
    each = np.array([[1 - float(rates(t)) * x for x in spectrum] for t in range(8)])
    exact = np.asarray(problem.params["w"])[None] * np.cumprod(each, 0)
    for top in (None, 3):
        flow = principal(dynamics, top=top)
        path = rj.integrate(flow, problem.params, 8, substeps=16).params["w"]
        np.testing.assert_allclose(path[1:], exact, rtol=0.03)


SPECTRUM = np.array([2.4, 0.8, 0.5, -0.3])


def test_top_in_closed_form():
    """|1 - eta l|^t along the top two, which climb and descend, and IGR on the rest."""
    problem = rj.problems.quadratic(SPECTRUM)
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flow = principal(dynamics, top=2)
    path = rj.integrate(flow, problem.params, 6, lr=1.0, **FINE)
    rate = np.append(
        np.log(np.abs(1 - SPECTRUM[:2])), -(SPECTRUM + SPECTRUM**2 / 2)[2:]
    )
    exact = np.exp(np.outer(np.arange(7), rate)) * problem.params["w"][None]
    np.testing.assert_allclose(path.params["w"], exact, rtol=1e-5)
    np.testing.assert_allclose(np.abs(path.final.directions), np.eye(2, 4), atol=1e-6)


@pytest.mark.parametrize("top", [4, 9])
def test_top_of_all_is_the_exact_flow_below_one(top):
    problem = rj.problems.quadratic(SPECTRUM[1:], seed=5)
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    lr, fields = jnp.asarray(1.1), []
    for flow in (principal(dynamics), principal(dynamics, top=top)):
        y = flow.init(problem.params, lr, KEY)
        fields.append(flow.vector_field(0.0, y, lr).mean.params["w"])
    np.testing.assert_allclose(fields[1], fields[0], rtol=1e-6)


def test_top_of_a_schedule_from_zero():
    warm = optax.linear_schedule(0.0, 0.5, 10)
    flow = principal(rj.dynamics(optax.sgd(warm), BOWL.loss), top=2)
    dy = flow.vector_field(0.0, flow.init(BOWL.params, None, KEY), None)
    for still in (dy.mean.params["w"], dy.directions):
        np.testing.assert_allclose(still, 0.0, atol=1e-12)


MLP = rj.problems.digits_mlp(20, widths=(4,))
calls = [0]


def mlp_loss(params):
    calls[0] += 1
    return MLP.loss(params)


MLP_SGD = rj.dynamics(optax.sgd, mlp_loss)
TRACKED = principal(MLP_SGD, top=6)


@lru_cache
def on_the_network(flow):
    """At two learning rates for which eta l stays below one."""
    solve = lambda lr: rj.integrate(flow, MLP.params, 20, lr=lr, substeps=8)
    return jax.jit(jax.vmap(solve))(jnp.array([0.05, 0.1]))


@pytest.fixture(scope="module")
def dense_hessian():
    unravel = ravel_pytree(MLP.params)[1]
    hessian = jax.jit(jax.hessian(lambda x: MLP.loss(unravel(x))))
    return lambda params: np.asarray(hessian(ravel_pytree(params)[0]))


def test_top_is_closer_than_igr_on_a_network():
    rates = jnp.array([0.05, 0.1])
    run = jax.vmap(lambda lr: rj.descend(MLP_SGD, MLP.params, 20, lr=lr))(rates)
    means = []
    for path in (on_the_network(TRACKED), on_the_network(igr(MLP_SGD))):
        apart = jax.tree.map(lambda p, e: p - e[:, :, 0], path.params, run.ends)
        norm = jax.vmap(jax.vmap(optax.tree.norm))(apart)
        means.append(np.asarray(norm.mean(1)))
    assert np.all(means[0] < 0.8 * means[1]), means


def test_tracked_directions_are_the_top_eigenvectors(dense_hessian):
    path = on_the_network(TRACKED)
    values, vectors = np.linalg.eigh(dense_hessian(MLP.params))
    rows = TRACKED.init(MLP.params, jnp.asarray(0.1), KEY).directions
    overlap = np.abs(np.sum(rows * vectors[:, :-7:-1].T, axis=1))
    np.testing.assert_allclose(overlap, 1.0, atol=1e-3)
    end = jax.tree.map(lambda x: x[1, -1], path.params)
    values, vectors = np.linalg.eigh(dense_hessian(end))
    assert abs(values[-1] * 0.1 - 0.6) < 0.1
    rows = np.asarray(path.final.directions[1])
    assert abs(rows[0] @ vectors[:, -1]) > 0.999
    held = np.trace(rows @ dense_hessian(end) @ rows.T)
    assert held > 0.98 * values[-6:].sum()


def test_top_compiles_once_for_every_learning_rate():
    solve = lambda lr: rj.integrate(TRACKED, MLP.params, 2, lr=lr)
    first = solve(0.02)
    traced = calls[0]
    second = solve(0.04)
    assert calls[0] == traced
    gap = optax.tree.norm(optax.tree.sub(first.params, second.params))
    assert float(gap) > 1e-3


MOMENTS = {
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "clipped": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "signs": optax.sign_sgd,
    "decayed": lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
}


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("name", MOMENTS)
def test_refuses_other_optimizers(name, top):
    flow = principal(rj.dynamics(MOMENTS[name], BOWL.loss), top=top)
    message = r"principal models gradient descent only.*stable, rod or modulated"
    with pytest.raises(ValueError, match=message):
        flow.init(BOWL.params, jnp.asarray(0.1), KEY)


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
    with pytest.raises(ValueError, match=rf"principal: the loss .*{message}.*top=k"):
        principal(dynamics).init(jnp.ones(3), jnp.asarray(0.1), KEY)
    # The approximation is real and does not mind.
    principal(dynamics, top=1).init(jnp.ones(3), jnp.asarray(0.1), KEY)


def test_a_loss_of_traced_data_is_served():
    def begin(scale):
        dynamics = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(scale * w**2))
        return principal(dynamics).init(jnp.ones(2), None, KEY).mean.params

    np.testing.assert_array_equal(jax.jit(begin)(jnp.ones(2)), 1.0)


@pytest.mark.parametrize("top", [0, -3])
def test_top_is_checked(top):
    with pytest.raises(ValueError, match=f"top must be at least 1, got {top}"):
        principal(SGD, top=top)
