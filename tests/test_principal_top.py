"""The principal flow of the top eigenspace: in closed form, and on a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Traced, dense_hessian, lane, runge_kutta
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.flows import igr, principal

KEY = jax.random.key(0)
SPECTRUM = np.array([2.4, 0.8, 0.5, -0.3])


def test_top_in_closed_form():
    """|1 - eta l|^t along the top two, which climb and descend, and IGR on the rest."""
    problem = rj.problems.quadratic(SPECTRUM)
    flow = principal(rj.dynamics(optax.sgd(1.0), problem.loss), rank=2)
    path = jax.jit(lambda w: runge_kutta(flow, w, 6, lr=None))(problem.params)
    rate = np.append(
        np.log(np.abs(1 - SPECTRUM[:2])), -(SPECTRUM + SPECTRUM**2 / 2)[2:]
    )
    exact = np.exp(np.outer(np.arange(1, 7), rate)) * problem.params["w"][None]
    np.testing.assert_allclose(path.mean.params["w"], exact, rtol=1e-5)
    last = np.abs(path.directions["w"][-1])
    np.testing.assert_allclose(last, np.eye(2, 4), atol=1e-6)


def first_field(flow, params):
    """The rate at the start."""

    @jax.jit
    def rate(params):
        return flow.vector_field(0.0, flow.init(params, lr=None, key=KEY), None)

    return rate(params)


@pytest.mark.parametrize("rank", [4, 9])
def test_top_of_all_is_the_exact_flow_below_one(rank):
    problem = rj.problems.quadratic(SPECTRUM[1:], seed=5)
    dynamics = rj.dynamics(optax.sgd(1.1), problem.loss)
    exact, top = (
        first_field(flow, problem.params).mean.params["w"]
        for flow in (principal(dynamics), principal(dynamics, rank=rank))
    )
    np.testing.assert_allclose(top, exact, rtol=1e-6)


def test_top_of_a_schedule_from_zero():
    bowl = rj.problems.quadratic(SPECTRUM)
    warm = optax.linear_schedule(0.0, 0.5, 10)
    flow = principal(rj.dynamics(optax.sgd(warm), bowl.loss), rank=2)
    dy = first_field(flow, bowl.params)
    for still in (dy.mean.params["w"], dy.directions["w"]):
        np.testing.assert_allclose(still, 0.0, atol=1e-12)


MLP = rj.problems.digits_mlp(20, widths=(4,))
LOSS = Traced(MLP.loss)
MLP_SGD = rj.dynamics(optax.sgd, LOSS)
TRACKED = principal(MLP_SGD, rank=4)
# Of eta l below one.
MLP_RATES = jnp.array([0.05, 0.1])


@jax.jit
@jax.vmap
def on_the_network(lr):
    """States of the tracked flow, and its and IGR's distances to gradient descent's."""
    run = rj.descend(MLP_SGD, MLP.params, 10, lr=lr)
    solve = lambda flow: runge_kutta(flow, MLP.params, 10, lr=lr, substeps=4)
    tracked, plain = solve(TRACKED), solve(igr(MLP_SGD))

    def distance(params):
        apart = jax.tree.map(lambda p, e: p - e[1:, 0], params, run.ends)
        return jnp.mean(jax.vmap(optax.tree.norm)(apart))

    return tracked, (distance(tracked.mean.params), distance(plain.params))


@pytest.mark.slow
def test_top_is_closer_than_igr_on_a_network():
    _, (tracked, plain) = on_the_network(MLP_RATES)
    assert np.all(tracked < 0.8 * plain), (tracked, plain)
    traced = LOSS.count
    assert not np.allclose(on_the_network(0.5 * MLP_RATES)[1][0], tracked)
    assert LOSS.count == traced


@pytest.mark.slow
def test_tracked_directions_are_the_top_eigenvectors():
    path = on_the_network(MLP_RATES)[0]
    for step in (0, -1):
        dense = dense_hessian(MLP.loss, lane(path.mean.params, (1, step)))
        values, vectors = np.linalg.eigh(dense)
        assert 0.5 < 0.1 * values[-1] < 0.7
        tree = lane(path.directions, (1, step))
        rows = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(tree))
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=0.02)
        assert abs(rows[0] @ vectors[:, -1]) > 0.98
        assert np.trace(rows @ dense @ rows.T) > 0.98 * values[-4:].sum()
