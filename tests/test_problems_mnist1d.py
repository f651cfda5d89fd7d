"""MNIST-1D as its package generates it, and an MLP and a CNN on it."""

import builtins
import hashlib
import random

import jax
import numpy as np
import pytest

from rodjax.problems import _mnist1d as module
from rodjax.problems import cnn, mlp, mnist1d

# Of all 4,000 samples to six decimals, and of their labels.
SIGNALS = "a628c903554582c85cd522460f0ac9376d8f2c1daf90d5ea251968c8de2fc707"
LABELS = "d97dc7aecec8ad6b5d8f143ba3e9c4bd7e25c420d7dfc2eb990591cfc0ed3e15"


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_the_data_are_those_of_the_package():
    inputs, targets = mnist1d(4000)
    assert inputs.shape == (4000, 40, 1) and targets.shape == (4000, 10)
    assert inputs.dtype == targets.dtype == "float64"
    # A rounded zero has no sign.
    rounded = np.round(np.asarray(inputs)[:, :, 0], 6) + 0.0
    assert digest(rounded) == SIGNALS
    labels = np.argmax(targets, axis=1)
    assert digest(labels.astype(np.int64)) == LABELS
    np.testing.assert_array_equal(np.sum(targets, axis=1), 1.0)
    assert abs(float(inputs.mean())) < 0.01 and abs(float(inputs.std()) - 1) < 0.01


def test_a_part_of_the_data():
    whole, part = mnist1d(9, skip=3), mnist1d(4, skip=5, dtype="float32")
    assert part.inputs.dtype == "float32"
    np.testing.assert_allclose(part.inputs, whole.inputs[2:6], rtol=1e-6)
    np.testing.assert_array_equal(part.targets, whole.targets[2:6])


def test_generators_that_all_share_are_left_as_they_were():
    module._generated.cache_clear()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    mnist1d(1)
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize("network", [mlp, cnn])
def test_networks_learn_it(network):
    problem = network(mnist1d(40, dtype="float32"))
    grad = jax.jit(jax.value_and_grad(problem.loss))
    params, (first, slope) = problem.params, grad(problem.params)
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
        last, slope = grad(params)
    assert last < 0.9 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 2, "skip": -1}, "skip=-1"),
        ({"n": 2, "skip": 3999}, "4001 exceeds the 4000 samples"),
        ({"n": 2, "dtype": "int32"}, "int32"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist1d(**settings)


def test_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("mnist1d"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    module._generated.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"rodjax\[data\]"):
        mnist1d(3)
