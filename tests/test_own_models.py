"""Models of the user's own, in Flax nnx and linen, Equinox, and plain pytrees."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rodjax as rj
from rodjax.problems import clusters

DATA = clusters(12, shape=(5,), classes=3)
KEY = jax.random.key(0)


def half_square(outputs):
    return jnp.mean(jnp.sum((outputs - DATA.targets) ** 2, axis=-1)) / 2


def of_nnx():
    rngs = nnx.Rngs(0)
    own = {"rngs": rngs, "param_dtype": float}
    model = nnx.Sequential(nnx.Linear(5, 4, **own), nnx.tanh, nnx.Linear(4, 3, **own))
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    loss = lambda params: half_square(nnx.merge(graph, params)(DATA.inputs))
    return loss, params


def of_nnx_state():
    """The state of nnx as it is, a pytree of nnx.Param."""
    loss, _ = of_nnx()
    graph, state = nnx.split(nnx.Linear(5, 3, rngs=nnx.Rngs(1), param_dtype=float))
    loss = lambda state: half_square(nnx.merge(graph, state)(DATA.inputs))
    return loss, state


def of_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(4, param_dtype=float)(x))
            return nn.Dense(3, param_dtype=float)(x)

    net = Net()
    params = net.init(KEY, DATA.inputs)["params"]
    return lambda params: half_square(
        net.apply({"params": params}, DATA.inputs)
    ), params


def of_equinox():
    model = eqx.nn.MLP(5, 3, 4, 1, activation=jnp.tanh, key=KEY, dtype=float)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda p: half_square(jax.vmap(eqx.combine(p, static))(DATA.inputs))
    return loss, params


def of_pytrees():
    first, second = jax.random.split(KEY)
    params = [jax.random.normal(first, (5, 4)), jax.random.normal(second, (4, 3))]
    return lambda w: half_square(jnp.tanh(DATA.inputs @ w[0]) @ w[1]), params


MAKERS = (
    of_nnx,
    of_equinox,
    *(
        pytest.param(m, marks=pytest.mark.slow)
        for m in (of_nnx_state, of_linen, of_pytrees)
    ),
)


STEPS = 4


def by_optax(optimizer, loss, params, steps):
    """The last two iterates, on the library's own kind of parameters."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        previous = params
        params, state = step(params, state)
    return previous, params


def descended(optimizer, make):
    """A run that is checked against Optax, its dynamics, and where it ended."""
    loss, params = make()
    dynamics = rj.dynamics(optimizer, loss)
    run = rj.descend(dynamics, params, STEPS)
    last = jax.tree.map(lambda x: x[-1], run.ends)
    reached = by_optax(optimizer, loss, params, int(run.steps[-1]) + 1)
    for i, expected in enumerate(reached):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y), last, expected
        )
    assert jax.tree.structure(run.params) == jax.tree.structure(params)
    return run, dynamics, params, reached[1]


@pytest.mark.parametrize("make", MAKERS)
def test_any_library_serves(make):
    _, dynamics, params, _ = descended(optax.sgd(0.02), make)
    flow = rj.flows.modulated(dynamics)
    y = flow.init(params, lr=None, key=KEY)
    moved = flow.centre(jax.jit(flow.vector_field)(0.0, y, None)).params
    # At so low a learning rate a flow moves as the optimizer does.
    (expected,) = jax.jit(dynamics.increment)(dynamics.init(params)).phase[:1]
    off = optax.tree.norm(optax.tree.sub(moved, expected))
    assert off < 0.03 * optax.tree.norm(expected)
    assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_with_momentum_and_second_moments():
    descended(optax.adam(0.02), of_linen)


def test_a_flow_is_solved_and_compared():
    run, dynamics, params, end = descended(optax.sgd(0.02), of_nnx_state)
    path = rj.integrate(rj.flows.igr(dynamics), params, STEPS)
    moved = optax.tree.norm(optax.tree.sub(end, params))
    assert rj.compare(run, path).distance[-1] < 0.03 * moved
    assert jax.tree.structure(path.params) == jax.tree.structure(params)
