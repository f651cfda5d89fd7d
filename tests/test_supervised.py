"""Losses in chunks against plain ones: values, derivatives, memory."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import unchecked

import rodjax as rj
from rodjax.problems import chunked_mean, clusters, cnn, digits, mlp, sorting

N = 23


def problem(chunk):
    data = clusters(N, shape=(4, 4, 1), classes=3, noise=1.0)
    return cnn(data, channels=(2,), chunk=chunk)


def assert_close(tree, other, tolerance=1e-13):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance),
        tree,
        other,
    )


@lru_cache
def everything(chunk):
    """Accuracy, loss and its derivatives, at the same point and vector for all."""
    made = problem(chunk)

    @jax.jit
    def find(w, v):
        accuracy = made.metrics["accuracy"](w)
        loss, gradient = jax.value_and_grad(made.loss)(w)
        third = rj.third_derivative(made.loss, w, v, v)
        return accuracy, loss, gradient, rj.hvp(made.loss, w, v), third

    return find(made.params, made.draw(jax.random.key(1)))


@pytest.mark.parametrize(
    "chunk", [5, *(pytest.param(c, marks=pytest.mark.slow) for c in (1, 22, 23, 100))]
)
def test_chunks_are_exact_to_rounding(chunk):
    tolerances = (1e-15, 1e-15, 1e-13, 1e-13, 1e-12)
    for found, expected, tolerance in zip(
        everything(chunk), everything(None), tolerances, strict=True
    ):
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize("chunk", [N, 100])
def test_a_chunk_of_all_is_the_plain_mean(chunk):
    assert_close(problem(chunk).loss(problem(None).params), everything(None)[1], 1e-15)


@pytest.mark.slow
def test_chunks_under_vmap_and_in_a_flow():
    fields = []
    for chunk in (5, None):
        made = mlp(clusters(N, shape=(3,), classes=2), widths=(2,), chunk=chunk)
        flow = rj.flows.modulated(rj.dynamics(optax.sgd, made.loss))

        def move(lr, flow=flow, params=made.params):
            y = flow.init(params, lr=lr, key=jax.random.key(0))
            return flow.vector_field(0.0, y, lr)

        fields.append(jax.jit(jax.vmap(move))(jnp.array([0.1, 0.3])))
    assert_close(*fields, 1e-12)


def test_sequences_in_chunks():
    chunked, whole = (sorting(N, width=4, chunk=c) for c in (4, None))
    losses = [jax.jit(p.loss)(whole.params) for p in (chunked, whole)]
    assert_close(*losses, 1e-14)


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
    with unchecked(), pytest.raises(ValueError, match=words):
        chunked_mean(function, data, chunk=chunk)
