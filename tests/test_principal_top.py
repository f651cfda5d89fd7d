"""The principal flow of the top eigenspace: in closed form, and on a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from test_gradient import solve

import rodjax as rj
from rodjax.flows import principal
from rodjax.flows import igr

KEY = jax.random.key(0)
SPECTRUM = np.array([2.4, 0.8, 0.5, -0.3])


def test_top_in_closed_form():
    """|1 - eta l|^t along the top two, which climb and descend, and IGR on the rest."""
    problem = rj.problems.quadratic(SPECTRUM)
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    flow = principal(dynamics, rank=2)
    path = jax.jit(lambda w: solve(flow, w, jnp.asarray(1.0), 6))(problem.params)
    rate = np.append(
        np.log(np.abs(1 - SPECTRUM[:2])), -(SPECTRUM + SPECTRUM**2 / 2)[2:]
    )
    exact = np.exp(np.outer(np.arange(1, 7), rate)) * problem.params["w"][None]
    np.testing.assert_allclose(path.mean.params["w"], exact, rtol=1e-5)
    np.testing.assert_allclose(np.abs(path.directions[-1]), np.eye(2, 4), atol=1e-6)


@pytest.mark.parametrize("rank", [4, 9])
def test_top_of_all_is_the_exact_flow_below_one(rank):
    problem = rj.problems.quadratic(SPECTRUM[1:], seed=5)
    dynamics = rj.dynamics(optax.sgd, problem.loss)
    lr, fields = jnp.asarray(1.1), []
    for flow in (principal(dynamics), principal(dynamics, rank=rank)):
        y = flow.init(problem.params, lr=lr, key=KEY)
        fields.append(flow.vector_field(0.0, y, lr).mean.params["w"])
    np.testing.assert_allclose(fields[1], fields[0], rtol=1e-6)


def test_top_of_a_schedule_from_zero():
    bowl = rj.problems.quadratic(SPECTRUM)
    warm = optax.linear_schedule(0.0, 0.5, 10)
    flow = principal(rj.dynamics(optax.sgd(warm), bowl.loss), rank=2)
    dy = flow.vector_field(0.0, flow.init(bowl.params, lr=None, key=KEY), None)
    for still in (dy.mean.params["w"], dy.directions):
        np.testing.assert_allclose(still, 0.0, atol=1e-12)


MLP = rj.problems.digits_mlp(20, widths=(4,))
calls = [0]


def mlp_loss(params):
    calls[0] += 1
    return MLP.loss(params)


MLP_SGD = rj.dynamics(optax.sgd, mlp_loss)
TRACKED = principal(MLP_SGD, rank=4)
# Of eta l below one.
MLP_RATES = jnp.array([0.05, 0.1])


@jax.jit
@jax.vmap
def on_the_network(lr):
    """States of the tracked flow, and its and IGR's distances to gradient descent's."""
    run = rj.descend(MLP_SGD, MLP.params, 10, lr=lr)
    paths = [solve(flow, MLP.params, lr, 10, 4) for flow in (TRACKED, igr(MLP_SGD))]
    mean = []
    for params in (paths[0].mean.params, paths[1].params):
        apart = jax.tree.map(lambda p, e: p - e[1:, 0], params, run.ends)
        mean.append(jnp.mean(jax.vmap(optax.tree.norm)(apart)))
    return paths[0], mean


def test_top_is_closer_than_igr_on_a_network():
    _, (tracked, plain) = on_the_network(MLP_RATES)
    assert np.all(tracked < 0.8 * plain), (tracked, plain)
    traced = calls[0]
    assert not np.allclose(on_the_network(0.5 * MLP_RATES)[1][0], tracked)
    assert calls[0] == traced


def test_tracked_directions_are_the_top_eigenvectors():
    path = on_the_network(MLP_RATES)[0]
    unravel = ravel_pytree(MLP.params)[1]
    hessian = jax.jit(jax.hessian(lambda x: MLP.loss(unravel(x))))
    for step in (0, -1):
        params = jax.tree.map(lambda x, t=step: x[1, t], path.mean.params)
        dense = np.asarray(hessian(ravel_pytree(params)[0]))
        values, vectors = np.linalg.eigh(dense)
        assert 0.5 < 0.1 * values[-1] < 0.7
        rows = np.asarray(path.directions[1, step])
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=0.02)
        assert abs(rows[0] @ vectors[:, -1]) > 0.98
        assert np.trace(rows @ dense @ rows.T) > 0.98 * values[-4:].sum()
