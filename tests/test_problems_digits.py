"""The digits data and MLP against numpy, and its training at the edge of stability."""

import builtins
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from rodjax.problems import digits, digits_mlp


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"rodjax\[data\]"):
        digits(3)


def raw_digits(n, skip):
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    return np.asarray(data)[skip : skip + n], np.asarray(labels)[skip : skip + n]


@pytest.mark.parametrize("skip", [0, 1747])
def test_digits_normalisation(skip):
    inputs, targets = digits(50, skip=skip)
    images, inputs = inputs, inputs.reshape(50, 64)
    assert float(images[3, 1, 2, 0]) == float(inputs[3, 10])
    raw, labels = raw_digits(50, skip)
    assert images.shape == (50, 8, 8, 1) and targets.shape == (50, 10)
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(
        inputs, (raw - raw.mean(axis=0)) / np.std(raw), atol=1e-6
    )
    np.testing.assert_array_equal(np.argmax(targets, axis=1), labels)
    np.testing.assert_array_equal(targets.sum(axis=1), 1)


def forward(params, x, activation):
    """The MLP in numpy."""
    layers = [params["layers"][i] for i in sorted(params["layers"])]
    for i, layer in enumerate(layers):
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = activation(x) if i < len(layers) - 1 else x
    return x


@pytest.mark.parametrize("activation", ["tanh", jnp.tanh])
def test_mlp_losses_match_numpy(activation):
    make = partial(digits_mlp, 30, widths=(8, 6), activation=activation, skip=5)
    inputs, targets = (np.asarray(a).reshape(30, -1) for a in digits(30, skip=5))
    mse, entropy = make(loss="mse"), make(loss="cross-entropy")
    outputs = forward(mse.params, inputs, np.tanh)
    np.testing.assert_allclose(
        mse.loss(mse.params),
        np.mean(np.sum((outputs - targets) ** 2, axis=1) / 2),
        rtol=1e-5,
    )
    log_sum = np.log(np.sum(np.exp(outputs), axis=1))
    np.testing.assert_allclose(
        entropy.loss(entropy.params),
        np.mean(log_sum - np.sum(outputs * targets, axis=1)),
        rtol=1e-5,
    )


@pytest.mark.parametrize(("loss", "value"), [("mse", 0.5), ("cross-entropy", 2.302585)])
def test_mlp_losses_at_zero(loss, value):
    problem = digits_mlp(10, widths=(4,), loss=loss)
    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    np.testing.assert_allclose(problem.loss(zeros), value, rtol=1e-6)


def test_mlp_initialisation():
    problem = digits_mlp(10, widths=(400, 100), seed=4)
    for layer in problem.params["layers"].values():
        assert float(jnp.abs(layer["bias"]).max()) == 0
        kernel = layer["kernel"]
        scaled = kernel * math.sqrt(kernel.shape[0]) / 0.6
        assert float(scaled.std()) == pytest.approx(1, abs=0.05)
        # Untruncated: a normal draw of this size passes 2.5 deviations.
        assert float(jnp.abs(scaled).max()) > 2.5
    other = digits_mlp(10, widths=(400, 100), seed=5).params
    kernels = (p["layers"][0]["kernel"] for p in (problem.params, other))
    assert float(jnp.abs(jnp.subtract(*kernels)).max()) > 0.1


def sharpness_path(problem, eta, every, points):
    """Top Hessian eigenvalue at the start and every few steps of gradient descent."""
    w, unravel = ravel_pytree(problem.params)
    grad = jax.grad(lambda v: problem.loss(unravel(v)))

    def sharpness(w, v):
        def power(v, _):
            # The shift lets the largest eigenvalue win over a negative one.
            hv = jax.jvp(grad, (w,), (v,))[1] + 2 * v
            return hv / jnp.linalg.norm(hv), None

        v, _ = jax.lax.scan(power, v, None, length=60)
        return v @ jax.jvp(grad, (w,), (v,))[1], v

    def segment(carry, _):
        w, v = carry
        value, v = sharpness(w, v)
        w = jax.lax.fori_loop(0, every, lambda _, w: w - eta * grad(w), w)
        return (w, v), value

    v = jax.random.normal(jax.random.key(9), w.shape, w.dtype)
    start = (w, v / jnp.linalg.norm(v))
    return np.asarray(
        jax.jit(lambda c: jax.lax.scan(segment, c, None, points)[1])(start)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not jax.config.read("jax_enable_x64"), reason="needs jax_enable_x64"
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_mlp_trains_at_the_edge_of_stability(seed):
    eta, every = 0.6, 10
    path = sharpness_path(digits_mlp(seed=seed, dtype="float64"), eta, every, 100)
    edge = 2 / eta
    # Once the first steps have left the initial point, which may be sharp,
    assert 1.5 < path[: 50 // every].min() < 0.9 * edge  # it is below the edge,
    assert path[: 300 // every].max() > 1.05 * edge  # sharpens beyond it,
    np.testing.assert_allclose(path[500 // every :], edge, rtol=0.05)  # and stays
