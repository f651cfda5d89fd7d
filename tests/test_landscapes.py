"""The banana valley and the cosine against their closed forms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import unchecked

from rodjax.problems import Problem, banana, cosine

NAN = float("nan")
POINTS = [(-1.0, 2.0), (0.3, -0.7), (1.0, 1.0), (2.0, 0.0)]


def rosenbrock(x, y, s):
    """Value, gradient and Hessian, by hand."""
    value = (1 - x) ** 2 + s * (y - x**2) ** 2
    gradient = [-2 * (1 - x) - 4 * s * x * (y - x**2), 2 * s * (y - x**2)]
    mixed = -4 * s * x
    hessian = [[2 - 4 * s * (y - 3 * x**2), mixed], [mixed, 2 * s]]
    return value, gradient, hessian


@pytest.mark.parametrize("steepness", [1.0, 100.0])
def test_banana_in_closed_form(steepness):
    loss = banana(steepness=steepness).loss
    as_dict = lambda v: loss({"x": v[0], "y": v[1]})
    found = [jax.jit(f) for f in (as_dict, jax.grad(as_dict), jax.hessian(as_dict))]
    for point in POINTS:
        for function, truth in zip(found, rosenbrock(*point, steepness), strict=True):
            np.testing.assert_allclose(function(jnp.array(point)), truth, rtol=1e-13)


@pytest.mark.parametrize("steepness", [0.5, 100.0])
def test_banana_minimum(steepness):
    loss = banana(steepness=steepness).loss
    bottom = {"x": jnp.ones(()), "y": jnp.ones(())}
    value, gradient = jax.value_and_grad(loss)(bottom)
    assert float(value) == float(gradient["x"]) == float(gradient["y"]) == 0
    h = jax.hessian(loss)(bottom)
    trace = h["x"]["x"] + h["y"]["y"]
    determinant = h["x"]["x"] * h["y"]["y"] - h["x"]["y"] * h["y"]["x"]
    np.testing.assert_allclose(trace, 2 + 10 * steepness, rtol=1e-12)
    np.testing.assert_allclose(determinant, 4 * steepness, rtol=1e-12)


@pytest.mark.parametrize("w", [-2.0, 0.0, 0.5, math.pi])
def test_cosine_in_closed_form(w):
    loss, w = cosine().loss, jnp.asarray(w)
    np.testing.assert_allclose(loss(w), math.cos(w), atol=1e-15)
    np.testing.assert_allclose(jax.grad(loss)(w), -math.sin(w), atol=1e-15)
    np.testing.assert_allclose(jax.hessian(loss)(w), -math.cos(w), atol=1e-15)


@pytest.mark.parametrize("eta", [0.3, 1.5, 2.2])
@pytest.mark.parametrize(
    "top, factor", [(True, lambda x: 1 + x), (False, lambda x: 1 - x)]
)
def test_cosine_factors_of_a_step(top, factor, eta):
    extremum = 2 * math.pi if top else math.pi
    problem = cosine(initial=extremum + 1e-6)
    after = problem.params - eta * jax.grad(problem.loss)(problem.params)
    np.testing.assert_allclose((after - extremum) / 1e-6, factor(eta), rtol=1e-8)


@pytest.mark.parametrize("make, name", [(banana, "banana"), (cosine, "cosine")])
@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_dtype_and_name(make, name, dtype):
    problem = make(dtype=dtype)
    assert isinstance(problem, Problem) and problem.name == name
    expected = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    value, grad = jax.jit(jax.value_and_grad(problem.loss))(problem.params)
    leaves = jax.tree.leaves((problem.params, value, grad))
    assert {leaf.dtype for leaf in leaves} == {expected}
    assert {leaf.shape for leaf in leaves} == {()}


def test_initial_values():
    assert {k: float(v) for k, v in banana().params.items()} == {"x": -1.0, "y": 2.0}
    assert {k: float(v) for k, v in banana(initial=(0.5, -3)).params.items()} == {
        "x": 0.5,
        "y": -3.0,
    }
    assert float(cosine().params) == 0.5 and float(cosine(initial=-2).params) == -2.0


@pytest.mark.parametrize("make", [banana, cosine])
def test_analytic(make):
    """At complex parameters the loss is complex, and conjugate at conjugate ones."""
    problem = make()
    turned = jax.tree.map(lambda x: x + 0.3j, problem.params)
    mirrored = jax.tree.map(jnp.conj, turned)
    assert abs(complex(problem.loss(turned)).imag) > 0.1
    np.testing.assert_allclose(
        problem.loss(mirrored), jnp.conj(problem.loss(turned)), rtol=1e-14
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(banana, steepness=0.0), "steepness=0.0"),
        (partial(banana, steepness=-1.0), "steepness=-1.0"),
        (partial(banana, steepness=NAN), "steepness="),
        (partial(banana, initial=(1.0,)), "initial has 1"),
        (partial(banana, initial=(1.0, 2.0, 3.0)), "initial has 3"),
        (partial(banana, initial=(1.0, math.inf)), "initial="),
        (partial(banana, dtype="int32"), r"dtype=.*floating"),
        (partial(cosine, initial=NAN), "initial="),
        (partial(cosine, dtype="int32"), r"dtype=.*floating"),
    ],
)
def test_bad_argument_is_named(make, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        make()
