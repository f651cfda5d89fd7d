"""The networks against the same formulas in numpy, and what a problem promises."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy.signal import correlate2d
from scipy.special import erf, softmax

import rodjax as rj
from rodjax.problems import clusters, cnn, mlp, sequences, sorting, vit

IMAGES = {"shape": (4, 4, 2), "classes": 3, "noise": 0.5}


def images(n=6, **settings):
    return clusters(n, **(IMAGES | settings))


NETWORKS = {
    "mlp": partial(mlp, widths=(5,)),
    "cnn": partial(cnn, channels=(3, 3)),
    "vit": partial(vit, patch=2, width=4, depth=1, heads=2),
}
NAMES = [*NETWORKS, "sorting"]


def small(name, dtype="float64", **settings):
    if name == "sorting":
        sizes = {"length": 3, "vocabulary": 4, "width": 4}
        return sorting(6, dtype=dtype, **sizes, **settings)
    return NETWORKS[name](images(dtype=dtype), **settings)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def mean_half_square(outputs, targets):
    return np.mean(np.sum((outputs - targets) ** 2, axis=-1)) / 2


def cross_entropy(outputs, targets):
    return -np.mean(np.sum(np.log(softmax(outputs, axis=-1)) * targets, axis=-1))


def test_cnn_matches_numpy():
    data = images()
    problem = cnn(data, channels=(3, 4), seed=1)
    # Biases are zero at the start, where they would prove nothing.
    params = jax.tree.map(lambda x: x + 0.1, problem.params)
    own = as_numpy(params)
    x = np.moveaxis(np.asarray(data.inputs), 3, 1)
    for layer in (own["convolutions"][i] for i in (0, 1)):
        kernel = layer["kernel"]
        channels = [
            [
                sum(
                    # A cross-correlation, padded with zeros to the same size.
                    correlate2d(image[c], kernel[:, :, c, o], mode="same")
                    for c in range(kernel.shape[2])
                )
                + layer["bias"][o]
                for o in range(kernel.shape[3])
            ]
            for image in x
        ]
        n, c, h, w = np.shape(channels)
        halves = np.reshape(np.tanh(channels), (n, c, h // 2, 2, w // 2, 2))
        x = halves.mean(axis=(3, 5))
    outputs = dense(np.reshape(np.moveaxis(x, 1, 3), (len(x), -1)), own["head"])
    expected = mean_half_square(outputs, np.asarray(data.targets))
    np.testing.assert_allclose(jax.jit(problem.loss)(params), expected, rtol=1e-10)


def test_cnn_on_signals_matches_numpy():
    data = images(shape=(8, 2))
    problem = cnn(data, channels=(3, 4), seed=1)
    params = jax.tree.map(lambda x: x + 0.1, problem.params)
    own, x = as_numpy(params), np.asarray(data.inputs)
    for layer in (own["convolutions"][i] for i in (0, 1)):
        padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        # A cross-correlation of width 3.
        near = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=1)
        mixed = np.einsum("nlcw,wcd->nld", near, layer["kernel"]) + layer["bias"]
        n, length, channels = mixed.shape
        x = np.tanh(mixed).reshape(n, length // 2, 2, channels).mean(axis=2)
    outputs = dense(x.reshape(len(x), -1), own["head"])
    expected = mean_half_square(outputs, np.asarray(data.targets))
    np.testing.assert_allclose(jax.jit(problem.loss)(params), expected, rtol=1e-10)


def normalize(x, layer):
    x = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
    return x / scale * layer["scale"] + layer["bias"]


def attend(x, layer):
    q, k, v = (
        np.einsum("ntd,dhe->nhte", x, layer[name]["kernel"])
        + layer[name]["bias"][:, None]
        for name in ("query", "key", "value")
    )
    weights = softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]), axis=-1)
    seen = np.einsum("nhte,hed->ntd", weights @ v, layer["out"]["kernel"])
    return seen + layer["out"]["bias"]


# Flax rounds a constant of the attention to float32, hence 1e-7 from here on.
def transform(x, own):
    x = x + own["positions"]
    for i in sorted(own["blocks"]):
        block = own["blocks"][i]
        x = x + attend(normalize(x, block["first"]), block["attention"])
        up = dense(normalize(x, block["second"]), block["up"])
        gelu = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
        # Flax's GELU is the approximation, close to the exact one.
        np.testing.assert_allclose(gelu, up * (1 + erf(up / np.sqrt(2))) / 2, atol=1e-3)
        x = x + dense(gelu, block["down"])
    return normalize(x, own["last"])


def test_vit_matches_numpy():
    data = images()
    problem = vit(data, patch=2, width=6, depth=2, heads=3, seed=2)
    params = jax.tree.map(lambda x: x + 0.1, problem.params)
    own, x = as_numpy(params), np.asarray(data.inputs)
    patches = [
        [image[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2)]
        for image in x
    ]
    tokens = transform(dense(np.array(patches), own["embed"]), own["transformer"])
    outputs = dense(tokens.mean(axis=1), own["head"])
    expected = mean_half_square(outputs, np.asarray(data.targets))
    np.testing.assert_allclose(jax.jit(problem.loss)(params), expected, rtol=1e-7)


@pytest.mark.parametrize(
    "loss", ["cross-entropy", pytest.param("mse", marks=pytest.mark.slow)]
)
def test_sorting_matches_numpy(loss):
    sizes = {"length": 5, "vocabulary": 4}
    problem = sorting(7, width=6, depth=2, heads=2, seed=3, loss=loss, **sizes)
    tokens, targets = as_numpy(sequences(7, seed=3, **sizes))
    np.testing.assert_array_equal(targets.argmax(axis=-1), np.sort(tokens))
    params = jax.tree.map(lambda x: x + 0.1, problem.params)
    own = as_numpy(params)
    x = own["embed"]["embedding"][tokens]
    outputs = dense(transform(x, own["transformer"]), own["head"])
    expected = {"cross-entropy": cross_entropy, "mse": mean_half_square}[loss]
    both = jax.jit(lambda w: (problem.loss(w), problem.metrics["accuracy"](w)))
    found, accuracy = both(params)
    np.testing.assert_allclose(found, expected(outputs, targets), rtol=1e-7)
    right = np.mean(outputs.argmax(axis=-1) == targets.argmax(axis=-1))
    assert float(accuracy) == pytest.approx(right)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mlp", "float32"),
        pytest.param("vit", "float64", marks=pytest.mark.slow),
        ("sorting", "float32"),
        pytest.param("cnn", "float64", marks=pytest.mark.slow),
        pytest.param("vit", "float32", marks=pytest.mark.slow),
        pytest.param("cnn", "float32", marks=pytest.mark.slow),
    ],
)
def test_dtype_draws_and_metrics(name, dtype):
    problem = small(name, dtype, seed=3)
    assert {x.dtype for x in jax.tree.leaves(problem.params)} == {jnp.dtype(dtype)}
    for function in (problem.loss, problem.metrics["accuracy"]):
        assert jax.eval_shape(function, problem.params).dtype == dtype
    keys = jax.vmap(jax.random.key)(jnp.arange(3, 5))
    # As a sweep draws them; run one by one, which compiles nothing new.
    several = jax.eval_shape(jax.vmap(problem.draw), keys)
    assert jax.tree.map(lambda x: (2, *x.shape), problem.params) == jax.tree.map(
        jnp.shape, several
    )
    first, second = map(problem.draw, keys)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
    jax.tree.map(same, first, problem.params)
    assert optax.tree.norm(optax.tree.sub(first, second)) > 0.1


@pytest.mark.slow
def test_weights_have_unit_gain():
    data = clusters(4, shape=(8, 8, 1), classes=2)
    first = vit(data, patch=4, width=100, depth=1, heads=4).params
    block = first["transformer"]["blocks"][0]
    kernels = {
        "up": block["up"]["kernel"],
        "query": block["attention"]["query"]["kernel"],
        "out": block["attention"]["out"]["kernel"],
        "conv": cnn(data, channels=(30, 30)).params["convolutions"][1]["kernel"],
    }
    fan_in = {"up": 100, "query": 100, "out": 100, "conv": 270}
    for name, kernel in kernels.items():
        assert float(kernel.std()) * math.sqrt(fan_in[name]) == pytest.approx(
            1, abs=0.05
        )


EVERY = {
    "stable": rj.flows.stable,
    "rod": rj.flows.rod,
    "bundle": lambda d: rj.flows.rod(d, rank=2),
    "modulated": rj.flows.modulated,
    "edge": rj.flows.edge,
    "central": lambda d: rj.flows.central(d, rank=1),
    "covariance": lambda d: rj.flows.covariance(d, rank=1),
    "gradient": rj.flows.gradient,
    "igr": rj.flows.igr,
    "third-order": rj.flows.third_order,
    "principal": lambda d: rj.flows.principal(d, rank=1),
}


def step_of(name, flow):
    """A flow from the start of a network, and how it moves there."""
    problem = small(name)
    made = EVERY[flow](rj.dynamics(optax.sgd, problem.loss))
    y = made.init(problem.params, lr=0.01, key=jax.random.key(0))
    return problem, made, y


@pytest.mark.parametrize(("name", "flow"), [("mlp", "modulated"), ("vit", "stable")])
def test_a_flow_moves_a_network_downhill(name, flow):
    problem, made, y = step_of(name, flow)

    @jax.jit
    def losses(y):
        moved = jax.tree.map(jnp.add, y, made.vector_field(0.0, y, 0.01))
        return [problem.loss(made.centre(z).params) for z in (y, moved)]

    before, after = losses(y)
    assert np.isfinite(before) and after < before


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flow", EVERY)
def test_every_flow_runs_on_every_network(name, flow):
    problem = small(name)
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    metrics = [rj.monitor(problem.metrics)]
    path = rj.integrate(
        EVERY[flow](dynamics), problem.params, 2, lr=0.01, substeps=1, metrics=metrics
    )
    assert np.isinf(path.diverged_at)
    loss = path.metrics["loss"]
    assert np.isfinite(loss).all() and loss[-1] < loss[0]
    assert ((path.metrics["accuracy"] >= 0) & (path.metrics["accuracy"] <= 1)).all()


def test_accuracy_is_recorded_along_a_run():
    problem = small("mlp")
    run = rj.descend(
        rj.dynamics(optax.sgd, problem.loss),
        problem.params,
        2,
        lr=0.01,
        metrics=[rj.monitor(problem.metrics)],
    )
    expected = jax.vmap(problem.metrics["accuracy"])(run.params)
    np.testing.assert_array_equal(run.metrics["accuracy"], expected)


@pytest.mark.slow
def test_clusters_train_at_the_edge_of_stability():
    problem, lr, every = mlp(clusters(100)), 0.8, 40
    flat, unravel = ravel_pytree(problem.params)
    loss = lambda w: problem.loss(unravel(w))
    step = lambda _, w: w - lr * jax.grad(loss)(w)

    def stretch(w, _):
        w = jax.lax.fori_loop(0, every, step, w)
        return w, lr / 2 * rj.sharpness(loss, w).value

    ratio = jax.jit(lambda w: jax.lax.scan(stretch, w, length=10)[1])(flat)
    assert ratio[0] < 0.8  # Progressive sharpening,
    assert ratio[2] > ratio[1] > ratio[0] + 0.02
    np.testing.assert_allclose(ratio[5:], 1.05, atol=0.07)  # up to the edge.
