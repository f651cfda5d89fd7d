"""Convolutions in loops: the same numbers, and axes that CPUs are fast at."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import rodjax as rj
from rodjax.optimizer import for_loops

IMAGES = ("NHWC", "HWIO", "NHWC")
SHAPES = {
    "as it is": ((2, 6, 5, 3), (3, 3, 3, 4), {}, IMAGES),
    "strides and padding": (
        (2, 6, 5, 3),
        (3, 2, 3, 4),
        {"window_strides": (2, 1), "padding": ((0, 1), (2, 1))},
        IMAGES,
    ),
    "dilated, in groups": (
        (2, 6, 9, 8),
        (3, 2, 2, 8),
        {"rhs_dilation": (2, 3), "feature_group_count": 4, "padding": "VALID"},
        IMAGES,
    ),
    "transposed": ((2, 4, 5, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 1)}, IMAGES),
    "channels first": ((2, 3, 6, 5), (4, 3, 3, 3), {}, ("NCHW", "OIHW", "NCHW")),
    "a signal": ((2, 3, 16), (4, 3, 5), {"window_strides": (2,)}, None),
    "mixed": ((2, 7, 7, 3), (3, 3, 3, 4), {}, ("NHWC", "HWIO", "NCHW")),
}


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_in_order(function, *arguments):
    """No convolution of its program has its axes in another order."""
    text = str(jax.make_jaxpr(function)(*arguments))
    specs = [x.split(")")[0] for x in text.split("lhs_spec=(")[1:]]
    assert specs
    for spec in specs:
        batch, last, *between = map(int, spec.split(","))
        assert (batch, *between, last) == tuple(range(last + 1))


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_the_same_to_rounding(name):
    x, kernel, given, spec = SHAPES[name]
    given = {"window_strides": (1,) * (len(x) - 2), "padding": "SAME"} | given
    if "lhs_dilation" in given:
        given["padding"] = ((1, 2), (0, 1))
    pair = draw(0, x), draw(1, kernel)
    wave = lambda pair: jnp.sum(
        jnp.sin(lax.conv_general_dilated(*pair, dimension_numbers=spec, **given))
    )
    plain = jax.grad(wave)
    slope = for_loops(plain)
    chex.assert_trees_all_close(slope(pair), plain(pair), rtol=1e-12, atol=1e-12)
    assert_in_order(slope, pair)
    turned = jax.tree.map(lambda x: x[::-1], pair)
    bend = lambda f: jax.jvp(f, (pair,), (turned,))[1]
    chex.assert_trees_all_close(bend(slope), bend(plain), rtol=1e-11, atol=1e-11)


@jax.custom_vjp
def weird(x):
    return x**2


weird.defvjp(lambda x: (x**2, x), lambda x, g: (7 * g,))


def test_what_stands_between_them_keeps_its_own_rules():
    x, kernel = draw(0, (2, 5, 5, 2)), draw(1, (3, 3, 2, 2))

    def net(kernel):
        by = lambda x: lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=IMAGES
        )
        x1 = jax.checkpoint(lambda x: jnp.tanh(by(x)))(jax.nn.relu(by(x)))
        x2 = jax.jit(lambda x: weird(by(x)))(x1)
        x3, _ = lax.scan(lambda x, _: (jnp.sin(x), None), x2, None, length=2)
        return jnp.sum(x3) + jnp.max(x3)

    slope = for_loops(jax.grad(net))
    expected = jax.grad(net)(kernel)
    np.testing.assert_allclose(slope(kernel), expected, rtol=1e-10)
    lanes = jnp.stack([kernel, 2 * kernel])
    found = jax.jit(jax.vmap(slope))(lanes)
    np.testing.assert_allclose(found[0], expected, rtol=1e-10)
    assert_in_order(slope, kernel)


IMAGE, KERNEL = draw(0, (4, 6, 6, 1)), 0.1 * draw(1, (3, 3, 1, 2))


def mean(kernel):
    found = lax.conv_general_dilated(
        IMAGE.astype(kernel.dtype), kernel, (1, 1), "SAME", dimension_numbers=IMAGES
    )
    return jnp.mean(jnp.tanh(found) ** 2)


@pytest.mark.parametrize("name", rj.flows.REGISTRY)
def test_flows_have_them_in_order(name):
    flow = rj.flows.REGISTRY[name].build(rj.dynamics(optax.sgd(0.1), mean))
    y = flow.init(KERNEL, lr=None, key=jax.random.key(0))
    assert_in_order(lambda y: flow.vector_field(0.0, y, None), y)


def test_updates_products_and_probes_have_them_in_order():
    dynamics = rj.dynamics(optax.sgd(0.1), mean)
    assert_in_order(dynamics.update, dynamics.init(KERNEL))
    assert_in_order(lambda v: rj.hvp(mean, KERNEL, v), KERNEL)
    names = ["sharpness", "step_curvature"]
    watched = rj.training.watch(optax.sgd(0.1), every=1, quantities=names)
    step = lambda state: watched.update(KERNEL, state, KERNEL, value_fn=mean)
    assert_in_order(step, watched.init(KERNEL))
