"""The modulated flow's own steps: powers of the update map by Euler's method."""

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import modulated

ONES = jnp.ones(1)
DEGREES = pytest.mark.parametrize("degree", [2, 3])
SUBSTEPS = pytest.mark.parametrize("substeps", [2, 3, 5])
# Of one parameter, whose curvature over the threshold's half is the learning rate.
BOWL = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))


def step_of(substeps, degree):
    """What a step of size 1 / substeps makes of 1, by its polynomial in X."""
    h = 1 / substeps
    near, far = (1 - h) / 2, (1 - h) * (2 - h) / (6 - 4 * h) * (degree == 3)
    return lambda x: 1 + h * x * (1 - near * x * (1 - far * x))


def centres(degree, lr, steps, **options):
    flow = modulated(BOWL, degree=degree, floor=0.0)
    return rj.integrate(flow, ONES, steps, lr=lr, **options).params[:, 0]


@DEGREES
@SUBSTEPS
def test_the_centre_on_a_quadratic(degree, substeps):
    per_step = step_of(substeps, degree)(-0.7) ** substeps
    found = centres(degree, 0.7, 6, substeps=substeps)
    np.testing.assert_allclose(found, per_step ** np.arange(7), rtol=1e-12)


@DEGREES
@SUBSTEPS
def test_what_is_left_out_of_the_power(degree, substeps):
    """The third power of X, of which degree 2 has nothing and degree 3 a part."""
    h, x = 1 / substeps, 1e-3
    whole = (1 - h) * (2 - h) / 6
    left = whole if degree == 2 else whole * (3 - h) / (6 - 4 * h)
    found = float(centres(degree, x, 1, substeps=substeps)[1]) - (1 - x)
    assert abs(found / (left * x**3) - 1) < 2e-2


def test_two_steps_are_closer_than_the_flow_itself():
    exact = 1 - 0.3
    own = abs(float(centres(2, 0.3, 1)[1]) - exact)
    heun = {"solver": diffrax.Heun(), "substeps": 64}
    assert own < 0.45 * abs(float(centres(2, 0.3, 1, **heun)[1]) - exact)


@DEGREES
@SUBSTEPS
@pytest.mark.parametrize("product", [1.9, 2.0, 2.05, 2.6])
def test_delta_grows_as_the_run(degree, substeps, product):
    lr = jnp.asarray(product)
    flow = modulated(BOWL, degree=degree, floor=0.0)
    field = jax.jit(flow.euler_field(1 / substeps))
    y = flow.init(ONES, lr=lr, key=jax.random.key(0))
    y = y._replace(delta=(jnp.full(1, 1e-4), *y.delta[1:]))
    for _ in range(substeps):
        slope = field(0.0, y, lr)
        y = jax.tree.map(lambda a, f: a + f / substeps, y, slope)
    np.testing.assert_allclose(y.delta[0], 1e-4 * (product - 1), rtol=1e-9)


@DEGREES
@pytest.mark.parametrize("product", [2.0, 2.4, 2.9])
def test_what_grows_along_delta_does_not_grow_in_the_centre(degree, product):
    lr = jnp.asarray(product)
    flow = modulated(BOWL, degree=degree, floor=0.0)
    y = flow.init(ONES, lr=lr, key=jax.random.key(0))
    y = y._replace(delta=(jnp.full(1, 1e-9), *y.delta[1:]))
    slope = flow.euler_field(0.5)(0.0, y, lr)
    assert abs(float(1 + 0.5 * slope.mean.params[0])) < 1 + 1e-6


@DEGREES
def test_complex_pairs_do_not_grow(degree):
    """Of momentum that loses next to nothing, at curvatures up to the threshold."""
    curvature = jnp.linspace(0.05, 3.9, 30)
    momentum = optax.sgd(1.0, momentum=0.9999)
    dynamics = rj.dynamics(momentum, lambda w: 0.5 * jnp.sum(curvature * w**2))
    flow = modulated(dynamics, degree=degree, floor=0.0)
    path = rj.integrate(flow, jnp.ones(30), 600)
    size = np.abs(path.params)
    assert np.all(size[300:].max(0) <= 1.001 * size[:300].max(0))


def test_short_steps_are_the_flow():
    flow = modulated(BOWL)
    y = flow.init(ONES, lr=jnp.asarray(0.5), key=jax.random.key(0))
    near, limit = (flow.euler_field(h)(0.0, y, 0.5) for h in (1e-9, 0.0))
    chex.assert_trees_all_close(near, limit, rtol=1e-7)
    chex.assert_trees_all_equal(limit, flow.vector_field(0.0, y, 0.5))


def test_which_steps_are_taken():
    """Its own by default and with Euler's method; the flow with any other solver."""
    by = lambda **options: centres(2, 0.7, 2, **options)
    own, flow = step_of(2, 2)(-0.7) ** 2, step_of(1e9, 2)(-0.7)
    np.testing.assert_allclose(by()[1], own, rtol=1e-12)
    np.testing.assert_allclose(by(solver=diffrax.Euler(), substeps=2)[1], own)
    slope = (flow - 1) * 1e9
    np.testing.assert_allclose(
        by(solver=diffrax.Tsit5(), substeps=8)[1], np.exp(slope), rtol=1e-6
    )
    adaptive = diffrax.PIDController(rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        by(stepsize_controller=adaptive)[1], np.exp(slope), rtol=1e-4
    )
    assert rj.flows.polar(modulated(BOWL)).euler_field is None


def test_steps_of_one_are_refused():
    with pytest.raises(ValueError, match="substeps=1: this flow is solved by Euler"):
        centres(2, 0.7, 2, substeps=1)
    with pytest.raises(ValueError, match="step must be at least 0 and less than 1"):
        modulated(BOWL).euler_field(1.0)


def test_evaluations_are_counted():
    for degree, count in ((2, 8), (3, 12)):
        flow = modulated(BOWL, degree=degree)
        path = rj.integrate(flow, ONES, 10, lr=0.5)
        assert float(path.evaluations) == 10 * count
