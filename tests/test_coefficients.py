"""Coefficients of the principal flow, and the metric, against dense computations."""

import dataclasses
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import principal_coefficient

coefficient = jax.jit(principal_coefficient)
# On either side of every change of formula, of sign and of branch.
REALS = np.array([-3.0, -0.3, 9e-4, 1.1e-3, 0.2, 0.49, 0.51, 0.9, 1.1, 1.9, 2.1, 9.0])


def truth(x):
    """log(1 - x) / x in NumPy's long doubles, the cut of the logarithm turned."""
    x = np.asarray(x, np.clongdouble)
    rest = 1 - x
    log = np.log(rest)
    return (log + np.where((rest.real < 0) & (rest.imag < 0), 2j * np.pi, 0)) / x


@pytest.mark.parametrize("dtype, rtol", [("complex128", 1e-15), ("complex64", 3e-7)])
@pytest.mark.parametrize("turn", [0.0, 0.3, -0.3])
def test_against_numpy(dtype, rtol, turn):
    x = (REALS + turn * 1j).astype(dtype)
    np.testing.assert_allclose(coefficient(x), truth(x), rtol=rtol)


def test_real_argument():
    found = coefficient(REALS)
    assert found.dtype == jnp.complex128
    np.testing.assert_allclose(found, truth(REALS), rtol=1e-15)
    assert coefficient(REALS.astype("float32")).dtype == jnp.complex64
    np.testing.assert_allclose(found.imag, np.where(REALS > 1, np.pi / REALS, 0))
    # Descended below eta l = 2, climbed beyond, wherever the curvature is positive.
    np.testing.assert_array_equal(found.real[2:] > 0, REALS[2:] > 2)


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-15), ("float32", 2e-7)])
def test_precision_near_zero(dtype, rtol):
    """Where log(1 - x) itself has lost all digits of x."""
    sizes = np.geomspace(1e-30, 0.4, 60)
    x = np.concatenate([sizes, -sizes]).astype(dtype)
    wide = x.astype(np.longdouble)
    found = coefficient(x)
    np.testing.assert_allclose(found.real, np.log1p(-wide) / wide, rtol=rtol)
    assert not np.any(found.imag)
    # Along the imaginary axis log(1 - i b) = ln(1 + b^2) / 2 - i atan b.
    b = wide[:60]
    sideways = coefficient(1j * x[:60])
    exact = (0.5 * np.log1p(b**2) - 1j * np.arctan(b)) / (1j * b)
    np.testing.assert_allclose(sideways, exact, rtol=rtol)
    assert complex(coefficient(jnp.zeros((), dtype))) == -1.0


@pytest.mark.parametrize("noise", [1e-17, 1e-12, 1e-6])
def test_noise_beside_the_negative_reals(noise):
    """Where iterates flip, rounding of either sign must not turn the branch."""
    x = np.array([1.1, 1.5, 2.0, 4.0])
    above, below = coefficient(x + noise * 1j), coefficient(x - noise * 1j)
    np.testing.assert_allclose(above, below, rtol=50 * noise + 1e-15)
    np.testing.assert_allclose(above.imag, np.pi / x, rtol=50 * noise + 1e-15)
    # NumPy's cut lies there.
    z = x + noise * 1j
    assert np.all((np.log(1 - z) / z).imag < 0)


def test_least_keeps_it_finite():
    assert np.isneginf(coefficient(1.0).real)
    found = jax.jit(partial(principal_coefficient, least=1e-3))(jnp.array([1.0, 1.5]))
    np.testing.assert_allclose(found[0], np.log(1e-3), rtol=1e-12)
    np.testing.assert_allclose(found[1], truth(1.5), rtol=1e-14)


def test_vmaps_and_is_strict_about_dtypes():
    grid = jnp.asarray(REALS).reshape(3, 4)
    np.testing.assert_array_equal(
        jax.vmap(coefficient)(grid), coefficient(REALS).reshape(3, 4)
    )
    with jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "complex64", "float64", "complex128"):
            jax.eval_shape(principal_coefficient, jnp.ones(3, dtype))


def loss(params):
    """Coupled, of two leaves, and of a curvature that changes."""
    a, b = params["a"], params["b"]
    curvature = jnp.array([2.0, 0.7, 0.2], a.dtype)
    return 0.5 * a @ (curvature * a) + jnp.cosh(jnp.sum(a) - b) + 0.1 * b**4


START = {"a": jnp.array([0.8, -0.6, 0.4]), "b": jnp.array(0.9)}
SGD = rj.dynamics(optax.sgd, loss)
METRIC = rj.stability_coefficients(SGD, 3)


def flat(params):
    return np.concatenate(
        [np.asarray(params["a"]), np.asarray(params["b"])[..., None]], -1
    )


@jax.jit
@jax.vmap
def dense(w):
    """Gradient, eigenvalues and eigenvectors at [a, b]."""
    of = lambda w: loss({"a": w[:3], "b": w[3]})
    return jax.grad(of)(w), *jnp.linalg.eigh(jax.hessian(of)(w))


def expected(params, lr):
    """[T, 3], the metric's values, for the largest eigenvalue first."""
    slope, values, vectors = (np.asarray(x) for x in dense(flat(params)))
    along = np.abs(np.einsum("td,tdk->tk", slope, vectors))
    x = lr * values
    return (np.log(np.abs(1 - x)) / x * along)[:, :0:-1]


def recorded(path):
    return np.stack(
        [path.metrics[f"stability_coefficient_{i}"] for i in (1, 2, 3)], axis=-1
    )


@pytest.mark.parametrize("lr", [0.1, 0.3])
def test_metric_along_a_run(lr):
    run = rj.descend(SGD, START, 12, lr=lr, metrics=[METRIC])
    np.testing.assert_allclose(recorded(run), expected(run.params, lr), 1e-6, 1e-9)
    assert float(jnp.max(run.metrics["stability_residual"])) < 1e-4


def test_metric_along_a_flow_and_under_vmap():
    flow = rj.flows.stable(SGD)
    options = {"metrics": [METRIC], "solver": diffrax.Euler(), "substeps": 1}
    solve = lambda lr: rj.integrate(flow, START, 6, lr=lr, **options)
    rates = jnp.array([0.2, 0.5])
    paths = jax.vmap(solve)(rates)
    for i, lr in enumerate(rates):
        path = jax.tree.map(lambda x, i=i: x[i], (paths.params, paths.metrics))
        found = recorded(dataclasses.replace(paths, metrics=path[1]))
        np.testing.assert_allclose(found, expected(path[0], float(lr)), 1e-6, 1e-9)


def test_sign_changes_at_the_edge():
    """Along the one direction that has a slope, eta l from below 2 to above."""
    sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * (4.0 * w[0] ** 2 + w[1] ** 2))
    metrics, start = [rj.stability_coefficients(sgd, 2)], jnp.array([0.5, 0.0])
    x = np.array([0.5, 1.5, 1.99, 2.01, 3.0])
    look = lambda lr: rj.descend(sgd, start, 1, lr=lr, metrics=metrics)
    runs = jax.vmap(look)(jnp.asarray(x / 4.0))
    first = np.asarray(runs.metrics["stability_coefficient_1"])
    slope = 4.0 * np.abs(runs.params[..., 0])
    np.testing.assert_allclose(first, (np.log(np.abs(1 - x)) / x)[:, None] * slope)
    np.testing.assert_array_equal(first > 0, np.tile(x[:, None] > 2, (1, 2)))
    assert np.all(np.abs(runs.metrics["stability_coefficient_2"]) < 1e-8)


def test_survives_divergence():
    lr = jnp.array([0.2, 30.0])
    run = jax.vmap(lambda lr: rj.descend(SGD, START, 12, lr=lr, metrics=[METRIC]))(lr)
    assert bool(jnp.isinf(run.diverged_at[0])) and not bool(
        jnp.isinf(run.diverged_at[1])
    )
    lane = jax.tree.map(lambda x: x[0], (run.params, run.metrics))
    found = recorded(dataclasses.replace(run, metrics=lane[1]))
    np.testing.assert_allclose(found, expected(lane[0], 0.2), 1e-6, 1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_number_of_pairs_is_checked(k):
    metric = rj.stability_coefficients(SGD, k)
    with pytest.raises(ValueError, match="k must be between 1 and the 4"):
        rj.descend(SGD, START, 1, lr=0.1, metrics=[metric])


@pytest.mark.parametrize("build", [optax.rmsprop, partial(optax.sgd, momentum=0.9)])
def test_refuses_other_optimizers(build):
    dynamics = rj.dynamics(build, loss)
    metric = rj.stability_coefficients(dynamics, 1)
    with pytest.raises(ValueError, match=r"gradient descent only.*spectrum"):
        rj.descend(dynamics, START, 1, lr=0.1, metrics=[metric])
