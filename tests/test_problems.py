"""The problems against what is known of them in closed form."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import unchecked
from jax.flatten_util import ravel_pytree

from rodjax.problems import (
    Problem,
    berthier,
    berthier_circle,
    berthier_matrix,
    digits,
    digits_mlp,
    factorization,
    float_dtype,
    quadratic,
    quartic_well,
    scalar_factorization,
)

needs_x64 = pytest.mark.skipif(
    not jax.config.read("jax_enable_x64"), reason="needs jax_enable_x64"
)
ALL = {
    "quadratic": partial(quadratic, [2.0, 1.0], seed=1),
    "quartic_well": quartic_well,
    "berthier": berthier,
    "berthier_circle": berthier_circle,
    "berthier_matrix": berthier_matrix,
    "factorization": partial(factorization, (4, 3, 2), [2.0, 1.0]),
    "scalar_factorization": scalar_factorization,
    "digits_mlp": partial(digits_mlp, 12, widths=(5,)),
}


def spectrum_at(problem, params):
    """Eigenvalues of the dense Hessian over the ravelled parameters, ascending."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda v: problem.loss(unravel(v))))
    return np.linalg.eigvalsh(hessian(flat))


def gradient_norm(problem, params):
    return float(optax.tree.norm(jax.jit(jax.grad(problem.loss))(params)))


def descend(problem, params, eta, steps):
    """Every iterate of gradient descent, stacked."""

    def step(w, _):
        w = jax.tree.map(lambda a, g: a - eta * g, w, jax.grad(problem.loss)(w))
        return w, w

    return jax.jit(lambda w: jax.lax.scan(step, w, None, steps)[1])(params)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "dtype", [None, "float32", pytest.param("float64", marks=needs_x64)]
)
def test_dtype_of_parameters_loss_and_gradient(name, dtype):
    problem = ALL[name](dtype=dtype)
    assert isinstance(problem, Problem)
    expected = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    value, grad = jax.jit(jax.value_and_grad(problem.loss))(problem.params)
    assert value.shape == () and value.dtype == expected
    for leaf in jax.tree.leaves((problem.params, grad)):
        assert leaf.dtype == expected and bool(jnp.isfinite(leaf).all())


@pytest.mark.parametrize("name", ALL)
def test_unfit_dtype_is_named(name):
    with pytest.raises(ValueError, match=r"dtype=.*floating"):
        ALL[name](dtype="int32")


def test_double_precision_without_x64_is_an_error():
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        float_dtype("float64")


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_quadratic_has_the_prescribed_spectrum(seed):
    spectrum = [-0.5, 0.1, 2.0, 7.0]
    problem = quadratic(spectrum, seed=seed)
    np.testing.assert_allclose(
        spectrum_at(problem, problem.params), spectrum, atol=1e-5
    )
    origin = {"w": jnp.zeros(4)}
    assert float(problem.loss(origin)) == gradient_norm(problem, origin) == 0


def test_quadratic_start_is_the_scaled_normal_draw():
    draw = jax.random.normal(jax.random.key(0), (3,))
    for seed in (None, 0):
        start = quadratic([1.0, 2.0, 3.0], seed=seed, scale=0.5).params["w"]
        np.testing.assert_allclose(start, 0.5 * draw, rtol=1e-6)


def test_quadratic_eigenbasis_is_seeded():
    one, two = (jax.hessian(quadratic([1.0, 3.0], seed=s).loss) for s in (1, 2))
    w = {"w": jnp.zeros(2)}
    assert float(jnp.abs(one(w)["w"]["w"] - two(w)["w"]["w"]).max()) > 0.1


@pytest.mark.parametrize("eta", [0.9, 1.0, 1.1])
def test_quartic_well_settles_on_its_two_cycle(eta):
    problem = quartic_well(sharpness=2.5, quartic=2.0, initial=0.1)
    w = descend(problem, problem.params, eta, 400)
    sigma = 2.5 / 2.0 - 2 / (eta * 2.0)
    np.testing.assert_allclose(w[-2:] ** 2, sigma, rtol=1e-4)
    assert float(w[-1] * w[-2]) < 0
    np.testing.assert_allclose(jax.hessian(problem.loss)(jnp.zeros(())), 2.5)


def test_berthier_curvature():
    problem = berthier(zeta=2.0, initial=(0.3, 4.0))
    hessian = jax.hessian(problem.loss)(problem.params)
    np.testing.assert_allclose(hessian["x"]["x"], 4.0 + 3 * 2.0 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(hessian["x"]["y"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(hessian["y"]["y"], 0.0)


@pytest.mark.parametrize(
    ("make", "forcing"),
    [
        (berthier, [1.0, 1.0]),
        (berthier_circle, [1.0, 1.0, 0.0]),
        (berthier_matrix, [1.0, 0.0, 2.0, 1.0, 1.0]),
    ],
)
def test_berthier_starts_in_the_valley_at_sharpness_five(make, forcing):
    problem = make(eps=0.02)
    values = spectrum_at(problem, problem.params)
    np.testing.assert_allclose(values[-1], 5.0, rtol=1e-6)
    flat = np.size(problem.params["y"])
    np.testing.assert_allclose(values[:flat], 0.0, atol=1e-6)
    # Only the forcing slopes.
    slope, _ = ravel_pytree(jax.grad(problem.loss)(problem.params))
    np.testing.assert_allclose(slope, -0.02 * np.array(forcing), rtol=1e-6)


def test_berthier_circle_and_matrix_off_the_valley():
    x, y = 0.4, np.array([3.0, -4.0])
    problem = berthier_circle(eps=0.1, initial=(x, *y))
    expected = (5 + 3 * math.exp(x / 2)) * x**2 / 2 - 0.1 * (x + 3)
    np.testing.assert_allclose(problem.loss(problem.params), expected, rtol=1e-6)
    problem = berthier_matrix(eps=0.1, initial=(1.0, -2.0, 3.0, 4.0, 5.0))
    square = 3 * 1 + 4 * 4 + 2 * 5 / math.sqrt(2) * 1 * -2
    expected = square / 2 + (1 - 8) / 2 - 0.1 * (1 + 6 + 4 + 5)
    np.testing.assert_allclose(problem.loss(problem.params), expected, rtol=1e-5)


def test_factorization_target_has_the_prescribed_singular_values():
    problem = factorization((5, 3, 4), [3.0, 1.0, 0.5], seed=2, scale=0.0)
    # At zero the loss is ||A||^2 / 2 and the Hessian couples w1, w2 through A.
    np.testing.assert_allclose(problem.loss(problem.params), 10.25 / 2, rtol=1e-5)
    top = np.sort(np.asarray(spectrum_at(problem, problem.params)))[::-1][:9]
    np.testing.assert_allclose(top, np.repeat([3.0, 1.0, 0.5], 3), atol=1e-4)


def test_factorization_minimum():
    problem = factorization((3, 3, 3), [2.0, 1.0, 0.5], seed=1)
    # With w1 = I the gradient in w2 at 0 is -A, which reveals the target.
    zero = {"w1": jnp.eye(3), "w2": jnp.zeros((3, 3))}
    target = -jax.grad(problem.loss)(zero)["w2"]
    w1 = 1.5 * jnp.eye(3) + 0.2 * jax.random.normal(jax.random.key(0), (3, 3))
    params = {"w1": w1, "w2": target @ jnp.linalg.inv(w1)}
    assert float(problem.loss(params)) < 1e-9
    assert gradient_norm(problem, params) < 1e-4
    norms = [float(jnp.linalg.norm(w, 2)) for w in params.values()]
    np.testing.assert_allclose(
        spectrum_at(problem, params)[-1], sum(n**2 for n in norms), rtol=1e-4
    )


@pytest.mark.parametrize("a", [0.5, 1.0, -3.0])
def test_scalar_factorization_minimum(a):
    problem = scalar_factorization(target=1.5)
    params = {"a": jnp.asarray(a), "b": jnp.asarray(1.5 / a)}
    assert float(problem.loss(params)) < 1e-12
    assert gradient_norm(problem, params) < 1e-5
    np.testing.assert_allclose(
        spectrum_at(problem, params), [0.0, a**2 + (1.5 / a) ** 2], atol=1e-5
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "args", "options", "message"),
    [
        (quadratic, ([],), {}, "spectrum has shape"),
        (quadratic, ([[1.0]],), {}, "spectrum has shape"),
        (quadratic, ([NAN],), {}, "spectrum has entries"),
        (quadratic, ([1.0],), {"scale": math.inf}, "scale="),
        (quartic_well, (), {"sharpness": 0.0}, "sharpness=0.0"),
        (quartic_well, (), {"quartic": -1.0}, "quartic=-1.0"),
        (quartic_well, (), {"initial": NAN}, "initial="),
        (berthier, (), {"eps": 0.0}, "eps=0.0"),
        (berthier, (), {"zeta": NAN}, "zeta="),
        (berthier, (), {"initial": (1.0,)}, "initial has 1"),
        (berthier_circle, (), {"eps": -1.0}, "eps=-1.0"),
        (berthier_circle, (), {"initial": (0.0, 5.0)}, "initial has 2"),
        (berthier_circle, (), {"initial": (1.0, 0.0, 0.0)}, "y = 0"),
        (berthier_circle, (), {"initial": (0.0, NAN, 1.0)}, "initial="),
        (berthier_matrix, (), {"eps": math.inf}, "eps=inf"),
        (berthier_matrix, (), {"initial": (0.0, 5.0)}, "initial has 2"),
        (factorization, ((2, 0, 2), [1.0]), {}, "dims="),
        (factorization, ((2, 2), [1.0]), {}, "dims="),
        (factorization, ((2, 2, 2), [1.0, 1.0, 1.0]), {}, "singular_values="),
        (factorization, ((2, 2, 2), [-1.0]), {}, "singular_values="),
        (factorization, ((2, 2, 2), [1.0]), {"scale": NAN}, "scale="),
        (scalar_factorization, (), {"target": NAN}, "target="),
        (scalar_factorization, (), {"initial": (1.0, NAN)}, "initial="),
        (digits, (0,), {}, "n=0"),
        (digits, (2.5,), {}, "n=2.5"),
        (digits, (10,), {"skip": -1}, "skip=-1"),
        (digits, (1000,), {"skip": 798}, r"n \+ skip = 1798"),
        (digits_mlp, (), {"widths": (16, 0)}, "widths="),
        (digits_mlp, (), {"activation": "no such"}, "activation="),
        (digits_mlp, (), {"loss": "hinge"}, "loss='hinge'"),
    ],
)
def test_bad_argument_is_named(make, args, options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        make(*args, **options)
