"""Scalar-second-moment optimizers against Optax, numpy and rotation invariance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rodjax.transforms import (
    ScaleByScalarRmsWithCountState,
    scalar_adam,
    scalar_nadam,
    scalar_rmsprop,
    scale_by_scalar_adam,
    scale_by_scalar_rms,
)

SCHEDULE = optax.exponential_decay(0.05, transition_steps=7, decay_rate=0.8)

ONE_PARAMETER = {
    "rmsprop": (scalar_rmsprop(0.05), optax.rmsprop(0.05)),
    "rmsprop eps outside": (
        scalar_rmsprop(0.05, eps=1e-3, eps_in_sqrt=False),
        optax.rmsprop(0.05, eps=1e-3, eps_in_sqrt=False),
    ),
    "rmsprop debiased": (
        scalar_rmsprop(0.05, 0.95, 1e-3, bias_correction=True),
        optax.rmsprop(0.05, 0.95, 1e-3, bias_correction=True),
    ),
    "rmsprop debiased eps outside": (
        scalar_rmsprop(0.05, eps_in_sqrt=False, bias_correction=True),
        optax.rmsprop(0.05, eps_in_sqrt=False, bias_correction=True),
    ),
    "rmsprop initial scale": (
        scalar_rmsprop(0.05, initial_scale=1.0),
        optax.rmsprop(0.05, initial_scale=1.0),
    ),
    "rmsprop schedule": (scalar_rmsprop(SCHEDULE), optax.rmsprop(SCHEDULE)),
    "adam": (scalar_adam(0.05), optax.adam(0.05)),
    "adam eps_root": (
        scalar_adam(0.05, 0.8, 0.99, 1e-4, 1e-2),
        optax.adam(0.05, 0.8, 0.99, 1e-4, 1e-2),
    ),
    "adam schedule": (scalar_adam(SCHEDULE), optax.adam(SCHEDULE)),
    "adam mu_dtype": (
        scalar_adam(0.05, mu_dtype=jnp.bfloat16),
        optax.adam(0.05, mu_dtype=jnp.bfloat16),
    ),
    "nadam": (scalar_nadam(0.05), optax.nadam(0.05)),
    "nadam mu_dtype": (
        scalar_nadam(0.05, mu_dtype=jnp.bfloat16),
        optax.nadam(0.05, mu_dtype=jnp.bfloat16),
    ),
}
OPTIMIZERS = {
    "rmsprop": scalar_rmsprop,
    "adam": scalar_adam,
    "nadam": scalar_nadam,
}


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["f32", "f64"])
def dtype(request):
    if request.param == jnp.float64 and not jax.config.read("jax_enable_x64"):
        pytest.skip("needs jax_enable_x64")
    return request.param


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tree_problem(dtype):
    """Parameters of three shapes and gradients that vary from step to step."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (3, 2), dtype),
        "b": jax.random.normal(keys[1], (4,), dtype),
        "c": jax.random.normal(keys[2], (), dtype),
    }
    return params, jax.grad(lambda p: sum(jnp.sum(x**4) for x in p.values()))


def descend(tx, params, grad, steps, state=None) -> tuple[Any, Any]:
    state = tx.init(params) if state is None else state

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(grad(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps)[0])
    return run((params, state))


@pytest.mark.parametrize("name", ONE_PARAMETER)
def test_one_parameter_equals_optax_exactly(name, dtype):
    ours, theirs = ONE_PARAMETER[name]
    w = v = jnp.asarray(1.3, dtype)
    grad = jax.grad(lambda x: x**4 / 4 + jnp.sin(3 * x))
    state = ours.init(w)
    with jax.numpy_dtype_promotion("standard"):  # what Optax itself needs
        reference = theirs.init(v)
    for _ in range(9):
        updates, state = ours.update(grad(w), state, w)
        w = optax.apply_updates(w, updates)
        with jax.numpy_dtype_promotion("standard"):
            updates, reference = theirs.update(grad(v), reference, v)
            v = optax.apply_updates(v, updates)
        np.testing.assert_array_equal(w, v)
    assert_same(jax.tree.leaves(state), jax.tree.leaves(reference))


def squared_norm(tree):
    return sum(float(np.sum(np.square(x))) for x in tree.values())


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_rmsprop_matches_numpy_on_a_tree(eps_in_sqrt, bias_correction):
    params, grad = tree_problem(float)
    tx = scalar_rmsprop(0.02, 0.9, 1e-2, 0.3, eps_in_sqrt, bias_correction)
    out, state = descend(tx, params, grad, 10)
    w, nu = {k: np.asarray(x) for k, x in params.items()}, 0.3
    for t in range(1, 11):
        g = {k: 4 * x**3 for k, x in w.items()}
        nu = 0.9 * nu + 0.1 * squared_norm(g)
        n = nu / (1 - 0.9**t) if bias_correction else nu
        root = np.sqrt(n + 1e-2) if eps_in_sqrt else np.sqrt(n) + 1e-2
        w = {k: x - 0.02 * g[k] / root for k, x in w.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out, w)
    np.testing.assert_allclose(state[0].nu, nu, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_adam_matches_numpy_on_a_tree(nesterov):
    params, grad = tree_problem(float)
    b1, b2, eps, eps_root = 0.8, 0.95, 1e-3, 1e-2
    tx = scalar_adam(0.02, b1, b2, eps, eps_root, nesterov=nesterov)
    out, state = descend(tx, params, grad, 10)
    w, nu = {k: np.asarray(x) for k, x in params.items()}, 0.0
    mu = {k: 0 * x for k, x in w.items()}
    for t in range(1, 11):
        g = {k: 4 * x**3 for k, x in w.items()}
        nu = b2 * nu + (1 - b2) * squared_norm(g)
        mu = {k: b1 * m + (1 - b1) * g[k] for k, m in mu.items()}
        if nesterov:
            m_hat = {
                k: b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g[k] / (1 - b1**t)
                for k, m in mu.items()
            }
        else:
            m_hat = {k: m / (1 - b1**t) for k, m in mu.items()}
        root = np.sqrt(nu / (1 - b2**t) + eps_root) + eps
        w = {k: x - 0.02 * m_hat[k] / root for k, x in w.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out, w)
    np.testing.assert_allclose(state[0].nu, nu, rtol=1e-5)


def rotation_gap(tx):
    """Distance between descending then rotating, and rotating then descending."""
    rotation = jax.random.orthogonal(jax.random.key(1), 5)
    stiffness = jnp.array([5.0, 2.0, 1.0, 0.5, 0.1])

    def loss(w):
        return jnp.sum(stiffness * w**2) / 2 + jnp.sum(w**4) / 4

    start = jax.random.normal(jax.random.key(2), (5,))
    w, _ = descend(tx, start, jax.grad(loss), 20)
    v, _ = descend(tx, rotation @ start, jax.grad(lambda v: loss(rotation.T @ v)), 20)
    return float(jnp.max(jnp.abs(rotation @ w - v)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rotation_invariance(name):
    assert rotation_gap(OPTIMIZERS[name](0.05)) < 1e-5


def test_per_component_adam_is_not_rotation_invariant():
    with jax.numpy_dtype_promotion("standard"):
        assert rotation_gap(optax.adam(0.05)) > 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_one_scalar_nu_and_dtypes_are_kept(name, dtype):
    params, grad = tree_problem(dtype)
    tx = OPTIMIZERS[name](0.1)
    state = tx.init(params)
    updates, after = tx.update(grad(params), state, params)
    nu = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
        if jax.tree_util.keystr(path).endswith(".nu")
    ]
    assert len(nu) == 1 and nu[0].shape == () and nu[0].dtype == dtype
    assert jax.tree.all(jax.tree.map(lambda u: u.dtype == dtype, updates))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_dtypes_keep_theirs_and_nu_takes_the_wider(name):
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    tx = OPTIMIZERS[name](0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["a"].dtype == jnp.bfloat16 and updates["b"].dtype == jnp.float32
    assert state[0].nu.dtype == jnp.float32


@pytest.mark.parametrize("bias_correction", [True, False])
def test_count_only_with_bias_correction(bias_correction):
    state = scale_by_scalar_rms(bias_correction=bias_correction).init(jnp.ones(2))
    assert isinstance(state, ScaleByScalarRmsWithCountState) is bias_correction


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jit_with_traced_learning_rate(name):
    params, grad = tree_problem(float)

    @jax.jit
    def step(rate):
        return descend(OPTIMIZERS[name](rate), params, grad, 3)

    expected = descend(OPTIMIZERS[name](0.05), params, grad, 3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        step(jnp.asarray(0.05)),
        expected,
    )


@pytest.mark.parametrize(
    "tx",
    [
        scale_by_scalar_rms(bias_correction=True),
        scale_by_scalar_adam(),
        scale_by_scalar_adam(nesterov=True),
    ],
    ids=["rms", "adam", "nadam"],
)
def test_float_count(tx, dtype):
    params, grad = tree_problem(dtype)
    state = tx.init(params)
    floating = state._replace(count=state.count.astype(float))
    out, after = descend(tx, params, grad, 5)
    out_float, after_float = descend(tx, params, grad, 5, floating)
    assert jnp.issubdtype(after_float.count.dtype, jnp.floating)
    assert float(after_float.count) == int(after.count) == 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out_float, out
    )


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (scale_by_scalar_rms, "decay"),
        (scale_by_scalar_adam, "b1"),
        (scale_by_scalar_adam, "b2"),
    ],
)
def test_bad_decay_is_named(make, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*decay rate"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (scale_by_scalar_rms, "eps"),
        (scale_by_scalar_rms, "initial_scale"),
        (scale_by_scalar_adam, "eps"),
        (scale_by_scalar_adam, "eps_root"),
    ],
)
def test_negative_constant_is_named(make, name):
    with pytest.raises(ValueError, match=f"{name}=-1.*{name} >= 0"):
        make(**{name: -1.0})


@pytest.mark.parametrize("make", [scale_by_scalar_rms, scale_by_scalar_adam])
@pytest.mark.parametrize("params", [{}, jnp.arange(3), jnp.ones(2, jnp.complex64)])
def test_bad_params_are_named(make, params):
    with pytest.raises(ValueError, match="params has"):
        make().init(params)
