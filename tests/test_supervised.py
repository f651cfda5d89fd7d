"""Losses in chunks against plain ones: values, derivatives, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.problems import _digits as digits, _sorting as sorting, chunked_mean, clusters, cnn, mlp

N = 23


def pair(chunk):
    """The same problem in chunks and in one piece."""
    data = clusters(N, shape=(4, 4, 1), classes=3, noise=1.0)
    return (cnn(data, channels=(3,), chunk=c) for c in (chunk, None))


def assert_close(tree, other, tolerance=1e-13):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance),
        tree,
        other,
    )


@pytest.mark.parametrize(
    "chunk", [5, 23, 100, *(pytest.param(c, marks=pytest.mark.slow) for c in (1, 22))]
)
def test_chunks_are_exact_to_rounding(chunk):
    chunked, whole = pair(chunk)
    w = whole.params
    v = whole.draw(jax.random.key(1))
    assert_close(chunked.loss(w), whole.loss(w), 1e-15)
    assert_close(jax.grad(chunked.loss)(w), jax.grad(whole.loss)(w))
    assert_close(rj.hvp(chunked.loss, w, v), rj.hvp(whole.loss, w, v))
    assert_close(
        rj.third_derivative(chunked.loss, w, v, v),
        rj.third_derivative(whole.loss, w, v, v),
        1e-12,
    )
    accuracy = (p.metrics["accuracy"](w) for p in (chunked, whole))
    assert_close(*accuracy)


def test_chunks_under_vmap_and_in_a_flow():
    chunked, whole = pair(5)
    paths = []
    for problem in (chunked, whole):
        flow = rj.flows.modulated(rj.dynamics(optax.sgd, problem.loss))
        solve = lambda lr, f=flow: rj.integrate(f, whole.params, 3, lr=lr)
        paths.append(jax.vmap(solve)(jnp.array([0.1, 0.3])))
    assert_close(*(path.params for path in paths), 1e-12)


def test_sequences_in_chunks():
    chunked, whole = (sorting(N, width=4, chunk=c) for c in (4, None))
    assert_close(chunked.loss(whole.params), whole.loss(whole.params), 1e-14)


@pytest.mark.parametrize("order", ["grad", "hvp"])
def test_memory_is_that_of_a_chunk(order):
    def temporary(n, chunk):
        problem = mlp(digits(n), widths=(64,), chunk=chunk)
        w = problem.params
        function = {
            "grad": jax.grad(problem.loss),
            "hvp": lambda w: rj.hvp(problem.loss, w, w),
        }[order]
        compiled = jax.jit(function).lower(w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, small, large = temporary(1600, None), temporary(400, 20), temporary(1600, 20)
    assert large < 0.3 * whole
    assert large < 1.2 * small


def test_samples_are_any_pytree():
    data = {"x": jnp.arange(7.0), "y": jnp.ones((7, 2))}
    mean = chunked_mean(lambda d: d["x"] * d["y"].sum(axis=1), data, chunk=3)
    assert float(mean) == 6


@pytest.mark.parametrize(
    ("function", "data", "chunk", "words"),
    [
        (jnp.sin, jnp.ones(4), 0, "chunk=0"),
        (jnp.sin, jnp.ones(4), 2.0, "chunk=2.0"),
        (jnp.sin, (jnp.ones(4), jnp.ones(3)), 2, "same number"),
        (jnp.sin, jnp.ones(()), None, "same number"),
        (jnp.sum, jnp.ones(4), 2, r"shape \(\) for 4 samples"),
        (lambda x: x[:, None], jnp.ones(4), None, "one number for each"),
    ],
)
def test_bad_arguments_are_named(function, data, chunk, words):
    with pytest.raises(ValueError, match=words):
        chunked_mean(function, data, chunk=chunk)
