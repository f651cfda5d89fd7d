"""Hessians, third derivatives and their metrics against dense linear algebra."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense_hessian
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.curvature import starting_directions
from rodjax.linalg._lobpcg import DENSE


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


def net_loss(params):
    """The loss of a small nested network, with 72 parameters."""
    inputs = jnp.linspace(-1.0, 1.0, 24, dtype=params["out"].dtype).reshape(6, 4)
    layer = params["layer"]
    outputs = jnp.tanh(inputs @ layer["v"] + layer["b"][None]) @ params["out"]
    return jnp.mean((outputs - jnp.sin(3 * inputs[:, 0])) ** 2)


def net_params():
    shapes = {"layer": {"b": (12,), "v": (4, 12)}, "out": (12,)}
    blank = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return optax.tree.random_like(jax.random.key(4), blank)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hvp_is_a_product_with_the_dense_hessian(dtype):
    params = tanh_params(dtype)
    vector = optax.tree.random_like(jax.random.key(1), params)
    product = jax.jit(lambda *x: rj.hvp(tanh_loss, *x))(params, vector)
    assert {x.dtype for x in jax.tree.leaves(product)} == {jnp.dtype(dtype)}
    assert jax.tree.structure(product) == jax.tree.structure(params)
    truth = dense_hessian(tanh_loss, params) @ ravel_pytree(vector)[0]
    rtol = 1e-4 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(ravel_pytree(product)[0], truth, rtol=rtol, atol=rtol)


def test_sharpness_of_a_pytree():
    params = tanh_params()
    assert ravel_pytree(params)[0].size < DENSE
    truth = np.linalg.eigvalsh(dense_hessian(tanh_loss, params))
    start = optax.tree.ones_like(params)

    @jax.jit
    def solve(params):
        pairs = [rj.sharpness(tanh_loss, params, guess=g) for g in (None, start)]
        return [(pair, rj.hvp(tanh_loss, params, pair.vector)) for pair in pairs]

    for pair, image in solve(params):
        np.testing.assert_allclose(pair.value, truth[-1], rtol=1e-12)
        assert jax.tree.map(jnp.shape, pair.vector) == jax.tree.map(jnp.shape, params)
        scaled = jax.tree.map(lambda v, p=pair: p.value * v, pair.vector)
        chex.assert_trees_all_close(image, scaled, atol=1e-12)


def test_sharpness_without_forming_the_hessian():
    mix = jax.random.normal(jax.random.key(1), (50, 40)) / 7.0
    loss = lambda p: jnp.sum(jnp.tanh(mix @ p["w"]) ** 2)
    params = {"w": 0.3 * jax.random.normal(jax.random.key(2), (40,))}
    truth = np.linalg.eigvalsh(dense_hessian(loss, params))
    pair = jax.jit(lambda p: rj.sharpness(loss, p))(params)
    np.testing.assert_allclose(pair.value, truth[-1], rtol=1e-12)


# Either way that an eigenpair is found, and either edge.
@pytest.mark.parametrize("width, momentum", [(5, 0.0), (40, 0.5)])
def test_edge_of_stability_along_a_run(width, momentum):
    lr = 0.05
    mix = jax.random.normal(jax.random.key(1), (50, width)) / 7.0
    loss = lambda w: jnp.sum(jnp.tanh(mix @ w - 0.5) ** 2)
    dynamics = rj.dynamics(lambda lr: optax.sgd(lr, momentum), loss)
    start = jax.random.normal(jax.random.key(2), (width,))
    metric = rj.edge_of_stability(dynamics)
    run = rj.descend(dynamics, start, 6, lr=lr, every=2, metrics=[metric])
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(run.params)
    truth = np.linalg.eigvalsh(hessians)[:, -1] * lr / (2 + 2 * momentum)
    np.testing.assert_allclose(run.metrics["sharpness_ratio"], truth, rtol=1e-10)
    assert float(run.metrics["residual"].max()) < 1e-7
    assert float(np.ptp(truth)) > 1e-3


def flat_rows(vectors):
    return jax.vmap(lambda v: ravel_pytree(v)[0])(vectors)


def test_hessian_eigenpairs_of_a_nested_pytree():
    params, k = net_params(), 3
    solve = jax.jit(lambda w, guess: rj.hessian_eigenpairs(net_loss, w, k, guess=guess))
    pairs = solve(params, starting_directions(params, k))
    truth, vectors = np.linalg.eigh(dense_hessian(net_loss, params))
    np.testing.assert_allclose(pairs.values, truth[::-1][:k], rtol=1e-11)
    assert jax.tree.structure(pairs.vectors) == jax.tree.structure(params)
    assert pairs.vectors["layer"]["v"].shape == (k, 4, 12)
    along = np.abs(np.sum(flat_rows(pairs.vectors).T * vectors[:, ::-1][:, :k], 0))
    np.testing.assert_allclose(along, 1.0, atol=1e-9)
    assert float(pairs.residuals.max()) < 1e-7
    nearby = jax.tree.map(lambda x: 1.0001 * x, params)
    warm = solve(nearby, pairs.vectors)
    assert 1 <= int(warm.iterations) < int(pairs.iterations)
    truth = np.linalg.eigvalsh(dense_hessian(net_loss, nearby))
    np.testing.assert_allclose(warm.values, truth[::-1][:k], rtol=1e-11)


@pytest.mark.parametrize(
    "optimizer", [pytest.param("rmsprop", marks=pytest.mark.slow), "adam"]
)
def test_preconditioned_eigenpairs_against_the_dense_matrix(optimizer):
    params, lr, k = net_params(), 0.01, 3
    dynamics = rj.dynamics(getattr(optax, optimizer), net_loss)
    state = dynamics.init(params, lr=lr)
    update = jax.jit(dynamics.update)
    for _ in range(5):
        state = update(state, lr=lr)

    @jax.jit
    def solve(state):
        return (
            rj.preconditioned_eigenpairs(dynamics, state, k, lr=lr),
            rj.sharpness_ratio(dynamics, state, lr=lr),
            ravel_pytree(rj.coordinate_thresholds(dynamics, state, lr=lr))[0],
        )

    pairs, one, edges = solve(state)
    if optimizer == "rmsprop":
        # GD's threshold times the preconditioner.
        root = (ravel_pytree(state.slow[1])[0] + 1e-8) ** 0.5
        np.testing.assert_allclose(edges, 2 / lr * root, rtol=1e-9)
    hessian = dense_hessian(net_loss, state.params)
    scaled = hessian / np.sqrt(np.outer(edges, edges))
    truth = np.linalg.eigvalsh(scaled)[::-1][:k]
    np.testing.assert_allclose(pairs.values, truth, rtol=1e-11)
    # Taken to the parameters they solve H w = ratio D w.
    rows = np.asarray(flat_rows(pairs.vectors)) / np.sqrt(edges)
    np.testing.assert_allclose(
        rows @ np.asarray(hessian),
        np.asarray(pairs.values)[:, None] * rows * np.asarray(edges),
        atol=1e-6,
    )
    np.testing.assert_allclose(one.value, pairs.values[0], rtol=1e-11)


@pytest.mark.parametrize("k", [0, 21])
def test_an_impossible_number_of_eigenpairs_is_named(k):
    params = tanh_params()
    sgd = rj.dynamics(optax.sgd(0.1), tanh_loss)
    with pytest.raises(ValueError, match=f"k must be .* 20 parameters; got {k}"):
        rj.hessian_eigenpairs(tanh_loss, params, k)
    with pytest.raises(ValueError, match=f"k must be .* 20 parameters; got {k}"):
        rj.preconditioned_eigenpairs(sgd, sgd.init(params), k)


def test_a_guess_of_another_shape_is_named():
    params = tanh_params()
    with pytest.raises(ValueError, match="leading axis k = 2"):
        rj.hessian_eigenpairs(tanh_loss, params, 2, guess=params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_third_derivative_against_the_dense_tensor(dtype):
    params = tanh_params(dtype)
    u, v = (optax.tree.random_like(jax.random.key(i), params) for i in (5, 6))
    solve = jax.jit(lambda *x: rj.third_derivative(tanh_loss, *x))
    bent = solve(params, u, v)
    assert jax.tree.map(jnp.shape, bent) == jax.tree.map(jnp.shape, params)
    assert {x.dtype for x in jax.tree.leaves(bent)} == {jnp.dtype(dtype)}
    flat, unravel = ravel_pytree(params)
    tensor = jax.jit(jax.jacfwd(jax.hessian(lambda x: tanh_loss(unravel(x)))))(flat)
    truth = jnp.einsum("ijk,i,j->k", tensor, ravel_pytree(u)[0], ravel_pytree(v)[0])
    tol = 1e-4 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(ravel_pytree(bent)[0], truth, rtol=tol, atol=tol)
    mirrored = solve(params, v, u)
    np.testing.assert_allclose(
        ravel_pytree(bent)[0], ravel_pytree(mirrored)[0], rtol=tol, atol=tol
    )


def test_third_derivative_of_a_cubic_is_exact():
    tensor = jnp.arange(27.0).reshape(3, 3, 3)
    loss = lambda w: jnp.einsum("ijk,i,j,k->", tensor, w, w, w)
    w, u, v = jnp.ones(3), jnp.array([1.0, 2.0, 0.0]), jnp.array([0.0, -1.0, 3.0])
    orders = ["ijk", "ikj", "jik", "jki", "kij", "kji"]
    truth = sum(jnp.einsum(f"{o},i,j->k", tensor, u, v) for o in orders)
    assert rj.third_derivative(loss, w, u, v).tolist() == truth.tolist()


def test_spectrum_along_a_run():
    lr, k = 0.05, 3
    mix = jax.random.normal(jax.random.key(1), (80, 60)) / 9.0
    loss = lambda w: jnp.sum(jnp.tanh(mix @ w - 0.5) ** 2)
    dynamics = rj.dynamics(lambda lr: optax.sgd(lr, 0.5), loss)
    start = jax.random.normal(jax.random.key(2), (60,))
    metric = rj.spectrum(dynamics, k)
    run = rj.descend(dynamics, start, 4, lr=lr, every=2, metrics=[metric])
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(run.params)
    truth = np.linalg.eigvalsh(hessians) * lr / 3
    for i in range(1, k + 1):
        np.testing.assert_allclose(run.metrics[f"ratio_{i}"], truth[:, -i], rtol=1e-10)
    assert "ratio_4" not in run.metrics
    assert float(run.metrics["residual"].max()) < 1e-7


def test_spectrum_names_an_impossible_k():
    sgd = rj.dynamics(optax.sgd(0.1), tanh_loss)
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        rj.spectrum(sgd, 0)
    with pytest.raises(ValueError, match="20 parameters; got 21"):
        rj.descend(sgd, tanh_params(), 2, metrics=[rj.spectrum(sgd, 21)])


def test_the_ratio_of_adam_is_the_dense_one():
    scales = jnp.logspace(-3, 1, 40)
    bent = lambda w: jnp.sum(scales * w**2) + 0.1 * jnp.sum(jnp.cos(w)) ** 2
    dynamics = rj.dynamics(optax.adam(0.01), bent)
    state = dynamics.init(jnp.linspace(-1.0, 1.0, 40))
    for _ in range(3):
        state = dynamics.update(state)
    edges = rj.coordinate_thresholds(dynamics, state)
    hessian = np.asarray(jax.hessian(bent)(state.params))
    root = 1 / np.sqrt(np.asarray(edges))
    dense = np.linalg.eigvalsh(root[:, None] * hessian * root[None])[-1]
    found = rj.sharpness_ratio(dynamics, state, tol=1e-9).value
    np.testing.assert_allclose(found, dense, rtol=1e-8)
    few = rj.sharpness_ratio(dynamics, state, products=30).value
    np.testing.assert_allclose(few, dense, rtol=1e-6)
