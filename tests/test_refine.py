"""The largest eigenpair within a budget of products, leaf by leaf."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import rodjax as rj
from rodjax.linalg import refined_eigenpair

N = 300
BULK = np.random.default_rng(0).uniform(-0.5, 3.0, N - 4)
# Larger in size than the largest eigenvalue is the least.
SPECTRUM = np.concatenate([[10.0, 9.0, 8.5, -11.0], BULK])
BASIS = np.linalg.qr(np.random.default_rng(1).normal(size=(N, N)))[0]
MATRIX = jnp.asarray(BASIS * SPECTRUM @ BASIS.T)


def solve(matrix, guess, products):
    return refined_eigenpair(lambda v: matrix @ v, guess, products)


def krylov(start, products):
    """The largest Ritz value of the Krylov space, by dense linear algebra."""
    columns = [np.asarray(start)]
    for _ in range(products - 1):
        columns.append(np.asarray(MATRIX) @ columns[-1])
    q = scipy.linalg.orth(np.stack(columns, 1))
    return scipy.linalg.eigvalsh(q.T @ np.asarray(MATRIX) @ q)[-1]


@pytest.mark.parametrize("products", [1, 2, 3])
def test_is_the_best_of_the_krylov_space(products):
    start = jnp.ones(N)
    pair = solve(MATRIX, start, products)
    np.testing.assert_allclose(pair.value, krylov(start, products), rtol=1e-10)
    if products > 1:
        off = jnp.linalg.norm(MATRIX @ pair.vector - pair.value * pair.vector)
        np.testing.assert_allclose(pair.residual, off / abs(pair.value), rtol=1e-8)
    np.testing.assert_allclose(jnp.linalg.norm(pair.vector), 1, rtol=1e-12)


@pytest.mark.parametrize(("each", "calls", "off"), [(1, 60, 2e-2), (3, 20, 1e-5)])
def test_call_after_call_finds_it(each, calls, off):
    one = jax.jit(lambda v: solve(MATRIX, v, each))
    pair = one(jnp.ones(N))
    for _ in range(calls - 1):
        pair = one(pair.vector)
    np.testing.assert_allclose(pair.value, 10.0, rtol=off)


def test_many_products_find_it():
    pair = solve(MATRIX, jnp.ones(N), 90)
    np.testing.assert_allclose(pair.value, 10.0, rtol=1e-8)
    assert pair.residual < 1e-4
    np.testing.assert_allclose(jnp.abs(pair.vector @ BASIS[:, 0]), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_any_scale_in_single_precision(scale):
    matrix = (MATRIX * scale).astype(jnp.float32)
    pair = solve(matrix, jnp.ones(N, jnp.float32), 60)
    np.testing.assert_allclose(pair.value, 10 * scale, rtol=1e-3)
    assert 0 <= pair.residual < 0.05


def test_what_a_krylov_space_ends_in():
    exact = jnp.asarray(BASIS[:, 0])
    for guess in (exact, 1e-200 * exact, -exact):
        pair = solve(MATRIX, guess, 3)
        np.testing.assert_allclose(pair.value, 10.0, rtol=1e-12)
        assert pair.residual < 1e-12
    for matrix, value in ((0 * MATRIX, 0.0), (-2 * jnp.eye(N), -2.0)):
        pair = solve(matrix, jnp.ones(N), 3)
        np.testing.assert_allclose(pair.value, value, atol=1e-12)
        assert jnp.isfinite(pair.vector).all() and pair.residual < 1e-12


@pytest.mark.parametrize("bad", [0.0, jnp.nan])
def test_a_guess_that_is_none(bad):
    pair = solve(MATRIX, jnp.full(N, bad), 90)
    np.testing.assert_allclose(pair.value, 10.0, rtol=1e-3)


def test_refuses_no_products():
    with pytest.raises(ValueError, match="products must be at least 1"):
        solve(MATRIX, jnp.ones(N), 0)


# --- as a probe of a loss ------------------------------------------------------------

SIZES = [(12, 20), (1, 20), (20, 3), ()]


def network(params, data):
    a, b, c, d = params
    return jnp.mean((jnp.tanh(data @ a + b) @ c + d) ** 2)


def parameters(dtype="float64"):
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    return [
        jax.random.normal(k, s, dtype) * 0.5 for k, s in zip(keys, SIZES, strict=True)
    ]


DATA = jax.random.normal(jax.random.key(5), (16, 12))


def test_sharpness_by_products_approaches_sharpness():
    params = parameters()
    exact = rj.sharpness(network, params, args=(DATA,), tol=1e-8)
    pair = rj.sharpness(network, params, args=(DATA,), products=60)
    np.testing.assert_allclose(pair.value, exact.value, rtol=1e-6)
    moved = optax.tree.add_scale(params, 1e-3, exact.vector)
    warm = rj.sharpness(network, moved, args=(DATA,), guess=exact.vector, products=1)
    truth = rj.sharpness(network, moved, args=(DATA,), guess=exact.vector)
    np.testing.assert_allclose(warm.value, truth.value, rtol=1e-4)


def test_another_batch_costs_no_compilation():
    # Without a guess, and with one.
    loss: Any = chex.assert_max_traces(n=2)(network)

    params = parameters()
    vector = rj.sharpness(loss, params, args=(DATA,), products=2).vector
    for seed in range(3):
        data = jax.random.normal(jax.random.key(seed), DATA.shape)
        pair = rj.sharpness(loss, params, args=(data,), guess=vector, products=2)
        vector = pair.vector


def test_a_loss_of_what_is_traced_is_not_kept():
    params = parameters()

    def scaled(scale):
        loss = lambda p: scale * network(p, DATA)
        return rj.sharpness(loss, params, products=3).value

    with jax.checking_leaks():
        one, two = jax.vmap(jax.jit(scaled))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-9)


def test_half_precision_parameters():
    params = parameters("bfloat16")
    data = DATA.astype(jnp.float32)
    pair = rj.sharpness(network, params, args=(data,), products=30)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    truth = rj.sharpness(network, wide, args=(DATA,)).value
    assert pair.value.dtype == jnp.float32
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(pair.vector))
    np.testing.assert_allclose(pair.value, truth, rtol=0.01)


def test_memory_of_a_few_copies():
    """Of a million parameters, beside what one product takes."""
    params = {"a": jnp.zeros((1000, 1000)), "b": jnp.zeros(1000)}
    loss = lambda p: jnp.sum((p["a"] @ p["b"]) ** 2) + jnp.sum(jnp.cos(p["a"]))
    copy = 8 * optax.tree.size(params)

    def temporary(function):
        compiled = jax.jit(function).lower(params, params).compile()
        found = compiled.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes / copy

    one = temporary(lambda p, v: rj.hvp(loss, p, v))
    for products in (3, 12):
        probe = lambda p, v, m=products: rj.sharpness(loss, p, guess=v, products=m)
        assert temporary(probe) < one + 5
    # Three vectors, the product, and what becomes of one of them.
    assert temporary(lambda p, v: rj.sharpness(loss, p, guess=v)) < one + 5


def test_products_or_a_tolerance():
    params = parameters()
    with pytest.raises(ValueError, match="not both"):
        rj.sharpness(network, params, args=(DATA,), products=3, tol=1e-3)
    sgd = rj.dynamics(optax.sgd(0.1), lambda p: network(p, DATA))
    with pytest.raises(ValueError, match="products must be at least 1"):
        rj.sharpness_ratio(sgd, sgd.init(params), products=0)
