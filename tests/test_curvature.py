"""Hessian-vector products and top eigenpairs against dense linear algebra."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.curvature import DENSE, KRYLOV, SWEEPS


def tanh_loss(params):
    """The loss of a small network, with 20 parameters."""
    inputs = jnp.linspace(-1.0, 1.0, 12, dtype=params["v"].dtype).reshape(4, 3)
    outputs = jnp.tanh(inputs @ params["v"] + params["b"][None]) @ params["w"]
    return jnp.mean((outputs - inputs[:, 0] ** 2) ** 2)


def tanh_params(dtype="float64"):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"b": (4,), "v": (3, 4), "w": (4,)}
    return {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def dense_hessian(loss, params):
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: loss(unravel(x)))(flat)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hvp_is_a_product_with_the_dense_hessian(dtype):
    params = tanh_params(dtype)
    vector = optax.tree.random_like(jax.random.key(1), params)
    product = rj.hvp(tanh_loss, params, vector)
    assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(product) == jax.tree.structure(params)
    truth = dense_hessian(tanh_loss, params) @ ravel_pytree(vector)[0]
    rtol = 1e-4 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(ravel_pytree(product)[0], truth, rtol=rtol, atol=rtol)


# n -> eigenvalues, largest last. Dense below DENSE, restarted Lanczos above it.
SPECTRA = {
    "isolated": lambda n: np.append(np.linspace(-0.1, 1.0, n - 1), 3.0),
    "close top pair": lambda n: np.append(np.linspace(0.1, 0.9, n - 2), [1.0, 1.001]),
    "double top": lambda n: np.append(np.linspace(0.1, 0.9, n - 2), [2.0, 2.0]),
    # The largest in size is -10: a power iteration would find that one.
    "negative bulk": lambda n: np.append(np.linspace(-10.0, -0.1, n - 1), 0.5),
    "all negative": lambda n: np.append(np.linspace(-10.0, -2.0, n - 1), -0.1),
    "rank three": lambda n: np.append(np.zeros(n - 3), [1.0, 2.0, 3.0]),
    "small top": lambda n: np.concatenate([[-5.0], np.zeros(n - 2), [1e-3]]),
    "rank one": lambda n: np.append(np.zeros(n - 1), 4.0),
}
SIZES = [20, 60, 400]


@cache
def matrix(name, n):
    basis = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))[0]
    return basis @ np.diag(SPECTRA[name](n)) @ basis.T


@jax.jit
def solve(symmetric, guess):
    return rj.top_eigenpair(lambda v: symmetric @ v, guess)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", SPECTRA)
def test_top_eigenpair_of_a_prescribed_spectrum(name, n, dtype):
    symmetric = jnp.asarray(matrix(name, n), dtype)
    values, vectors = np.linalg.eigh(matrix(name, n))
    pair = solve(symmetric, jax.random.normal(jax.random.key(1), (n,), dtype))
    eps = float(jnp.finfo(dtype).eps)
    size = abs(values).max()
    assert pair.value.dtype == pair.vector.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(pair.value, values[-1], rtol=1e-12, atol=50 * eps * size)
    np.testing.assert_allclose(jnp.linalg.norm(pair.vector), 1.0, rtol=10 * eps)
    # Rounding allows no residual below eps |A|, however small the eigenvalue.
    tol = max(eps**0.5, 50 * eps * size / abs(values[-1]))
    assert float(pair.residual) <= tol
    gap = np.linalg.norm(symmetric @ pair.vector - pair.value * pair.vector)
    assert gap / abs(values[-1]) <= tol
    if name != "double top":
        along = abs(float(pair.vector @ vectors[:, -1]))
        distance = values[-1] - values[-2]
        assert along > 1 - max((tol * abs(values[-1]) / distance) ** 2, 50 * eps)


def counted(symmetric):
    """The product with a matrix, and a list that grows by one a call."""
    calls = []

    def matvec(v):
        jax.debug.callback(lambda: calls.append(1))
        return symmetric @ v

    return matvec, calls


@pytest.mark.parametrize("name", ["close top pair", "all negative"])
def test_warm_start_needs_one_sweep(name):
    n = 60
    symmetric = jnp.asarray(matrix(name, n))
    matvec, calls = counted(symmetric)

    @jax.jit
    def run(guess):
        return rj.top_eigenpair(matvec, guess)

    cold = run(jnp.ones(n))
    jax.effects_barrier()
    cost = len(calls)
    # Where the next step of a trajectory starts: close to, but not at, the vector.
    nudge = 1e-7 * jax.random.normal(jax.random.key(3), (n,))
    warm = run(cold.vector + nudge)
    jax.effects_barrier()
    one_sweep = KRYLOV + 1
    assert len(calls) - cost == one_sweep < 2 * one_sweep < cost
    np.testing.assert_allclose(warm.value, cold.value, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["isolated", "rank one"])
def test_an_exact_eigenvector_is_a_fine_guess(name, n, dtype):
    values, vectors = np.linalg.eigh(matrix(name, n))
    symmetric = jnp.asarray(matrix(name, n), dtype)
    pair = solve(symmetric, jnp.asarray(vectors[:, -1], dtype))
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        pair.value, values[-1], rtol=0, atol=50 * eps * abs(values).max()
    )


def test_an_eigenvector_below_the_top_does_not_trap_the_iteration():
    values, vectors = np.linalg.eigh(matrix("isolated", 60))
    pair = solve(jnp.asarray(matrix("isolated", 60)), jnp.asarray(vectors[:, 0]))
    np.testing.assert_allclose(pair.value, values[-1], rtol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_multiples_of_the_identity(scale):
    guess = jax.random.normal(jax.random.key(1), (60,), jnp.float32)
    pair = solve(scale * jnp.eye(60, dtype=jnp.float32), guess)
    np.testing.assert_allclose(pair.value, scale, atol=1e-5)


def test_what_has_not_converged_says_so():
    # One eigenvalue every 1 / 400: no gap to speak of at the top.
    symmetric = jnp.diag(jnp.linspace(-1.0, -1e-3, 400))
    matvec, calls = counted(symmetric)
    pair = jax.jit(lambda v: rj.top_eigenpair(matvec, v, tol=1e-13))(jnp.ones(400))
    jax.effects_barrier()
    assert len(calls) == SWEEPS * (KRYLOV + 1)
    assert float(pair.residual) > 1e-13
    error = abs(float(pair.value) + 1e-3) / 1e-3
    assert error <= float(pair.residual) < np.inf


@pytest.mark.parametrize("n", [20, 60])
def test_lanes_of_a_vmap_equal_single_solves(n):
    stack = jnp.stack([matrix(name, n) for name in ("isolated", "negative bulk")])
    guess = jax.random.normal(jax.random.key(1), (n,))
    many = jax.vmap(solve, (0, None))(stack, guess)
    for i, symmetric in enumerate(stack):
        # A lane that is done waits for the others unchanged.
        one = solve(symmetric, guess)
        np.testing.assert_allclose(many.value[i], one.value, rtol=1e-13)
        assert abs(float(many.vector[i] @ one.vector)) == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("guess", ["none", "given"])
def test_sharpness_of_a_pytree(guess):
    params = tanh_params()
    assert ravel_pytree(params)[0].size < DENSE
    start = optax.tree.ones_like(params) if guess == "given" else None
    pair = rj.sharpness(tanh_loss, params, start)
    truth = np.linalg.eigvalsh(dense_hessian(tanh_loss, params))
    np.testing.assert_allclose(pair.value, truth[-1], rtol=1e-12)
    assert jax.tree.map(jnp.shape, pair.vector) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        rj.hvp(tanh_loss, params, pair.vector)["v"],
        pair.value * pair.vector["v"],
        atol=1e-12,
    )


def test_sharpness_without_forming_the_hessian():
    mix = jax.random.normal(jax.random.key(1), (50, 40)) / 7.0
    loss = lambda p: jnp.sum(jnp.tanh(mix @ p["w"]) ** 2)
    params = {"w": 0.3 * jax.random.normal(jax.random.key(2), (40,))}
    truth = np.linalg.eigvalsh(dense_hessian(loss, params))
    pair = jax.jit(lambda p: rj.sharpness(loss, p))(params)
    np.testing.assert_allclose(pair.value, truth[-1], rtol=1e-12)


@pytest.mark.parametrize("width", [5, 40])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_edge_of_stability_along_a_run(width, momentum):
    lr = 0.05
    mix = jax.random.normal(jax.random.key(1), (50, width)) / 7.0
    loss = lambda w: jnp.sum(jnp.tanh(mix @ w - 0.5) ** 2)
    dynamics = rj.dynamics(lambda lr: optax.sgd(lr, momentum), loss)
    start = jax.random.normal(jax.random.key(2), (width,))
    metric = rj.edge_of_stability(dynamics)
    run = rj.descend(dynamics, start, 6, lr=lr, every=2, metrics=[metric])
    hessians = jax.vmap(jax.hessian(loss))(run.params)
    truth = np.linalg.eigvalsh(hessians)[:, -1] * lr / (2 + 2 * momentum)
    np.testing.assert_allclose(run.metrics["sharpness_ratio"], truth, rtol=1e-10)
    assert float(run.metrics["residual"].max()) < 1e-7
    assert float(np.ptp(truth)) > 1e-3
