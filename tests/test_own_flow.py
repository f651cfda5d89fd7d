"""A flow made by hand, and any flow in the user's own call of diffrax."""

from typing import Any, NamedTuple

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import heun

import rodjax as rj

KEY = jax.random.key(0)
START = jnp.array([1.0, -0.5])
SGD = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(jnp.array([1.0, 0.25]) * w**2))


# --- by hand -------------------------------------------------------------------------


def damped(t, y, lr):
    """Half of the stable flow's field."""
    return jax.tree.map(lambda f: 0.5 * f, SGD.increment(y, lr=lr))


def exact(lr, steps):
    """Of the damped flow."""
    times = np.arange(steps + 1.0)
    return np.exp(-0.5 * lr * np.outer(times, [1.0, 0.25])) * np.asarray(START)


class Measured(NamedTuple):
    """A state with more in it than the optimizer's."""

    mean: rj.State
    length: Any


def measured(t, y, lr):
    rate = damped(t, y.mean, lr)
    return Measured(rate, optax.tree.norm(rate.params))


def begin(start, *, lr, key):
    mean = rj.flows.centre_of(SGD, start, lr=lr)
    return Measured(mean, jnp.zeros(()))


# Nothing but what must be given; of a state of one's own that is `init` too.
HAND = {
    "State": rj.Flow(dynamics=SGD, vector_field=damped),
    "mean": rj.Flow(dynamics=SGD, vector_field=measured, init=begin),
}


@pytest.mark.parametrize("name", HAND)
def test_a_flow_by_hand_has_defaults_that_serve(name):
    flow, lr = HAND[name], jnp.asarray(0.3)
    window = rj.warm_up(SGD, START, 4, lr=lr)
    for start, centre in ((START, START), (window, rj.midpoint(window).params)):
        y = flow.init(start, lr=lr, key=KEY)
        chex.assert_trees_all_equal(flow.centre(y).params, centre)
        ends, report = flow.observe(y, lr=lr)
        chex.assert_trees_all_equal(ends, centre[None])
        assert report == {} == dict(flow.reports)
    assert (flow.evaluations, flow.products, flow.offset) == (1, 0, 0)
    path = rj.integrate(flow, START, 5, lr=lr)
    np.testing.assert_allclose(path.params, exact(0.3, 5), rtol=5e-4)
    np.testing.assert_array_equal(path.metrics["amplitude"], 0.0)
    chex.assert_trees_all_equal(path.metrics["loss"], path.metrics["mean_loss"])
    if name == "mean":
        # A straight line would be shorter.
        assert path.final.state.length > np.linalg.norm(path.params[-1] - START)


def test_a_flow_by_hand_may_say_what_it_reports():
    def observe(y, *, lr):
        ends = rj.flows.stack(y.params, -y.params)
        return ends, {"height": jnp.max(y.params)}

    flow = rj.Flow(
        dynamics=SGD,
        vector_field=damped,
        observe=observe,
        reports={"height": "largest entry"},
        offset=0.5,
        evaluations=3,
    )
    path = rj.integrate(flow, START, 2, lr=0.3, substeps=2)
    np.testing.assert_array_equal(path.metrics["height"], path.params[:, 0])
    np.testing.assert_array_equal(path.steps, [0.5, 1.5, 2.5])
    # Both ends are as far from the centre in the mean square as 0 and 2 are.
    size = np.linalg.norm(path.params, axis=1)
    np.testing.assert_allclose(path.metrics["amplitude"], 2**0.5 * size)
    assert float(path.evaluations) == 2 * 2 * 2 * 3
    assert dict(path.long_names)["height"] == "largest entry"


def test_a_flow_takes_keywords_only_and_is_not_changed():
    with pytest.raises(TypeError):
        rj.Flow(SGD, damped)
    with pytest.raises(AttributeError):
        HAND["State"].offset = 0.5


# --- the user's own solver -----------------------------------------------------------

STEPS = 4
RATES = jnp.array([0.05, 0.1])
PID = diffrax.PIDController(rtol=1e-8, atol=1e-10)
BEND = rj.dynamics(optax.sgd, lambda w: jnp.sum(w**2) + jnp.sum(w**4))
FLOW = rj.flows.modulated(BEND)
SOLVERS = {
    "explicit": (diffrax.Heun(), diffrax.ConstantStepSize(), 0.25),
    "adaptive": (diffrax.Tsit5(), PID, None),
    "implicit": (diffrax.Kvaerno3(), PID, 0.1),
}


@pytest.fixture(scope="module")
def fine():
    """The centres at whole steps, by many small steps, for each rate."""
    solve = heun(FLOW, substeps=512)

    def centres(lr):
        y = FLOW.init(START, lr=lr, key=KEY)
        kept = [y]
        for _ in range(STEPS):
            kept.append(solve(kept[-1], lr, 512))
        return jnp.stack([FLOW.centre(y).params for y in kept])

    return jnp.stack([centres(lr) for lr in RATES])


@pytest.mark.parametrize(
    "name", ["explicit", "adaptive", pytest.param("implicit", marks=pytest.mark.slow)]
)
def test_a_flow_in_ones_own_solver(name, fine):
    """Dense, compiled, and over learning rates at once."""
    solver, controller, dt0 = SOLVERS[name]

    def solve(lr):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(FLOW.vector_field),
            solver,
            t0=0.0,
            t1=float(STEPS),
            dt0=dt0,
            y0=FLOW.init(START, lr=lr, key=KEY),
            args=lr,
            saveat=diffrax.SaveAt(dense=True),
            stepsize_controller=controller,
        )

    dense = jax.jit(jax.vmap(solve))(RATES)
    times = jnp.arange(STEPS + 1.0)
    at = lambda dense: jax.vmap(lambda t: FLOW.centre(dense.evaluate(t)).params)(times)
    found = jax.vmap(at)(dense)
    if name == "explicit":
        own = lambda lr: rj.integrate(FLOW, START, STEPS, lr=lr, solver=solver).params
        np.testing.assert_allclose(found, jnp.stack(list(map(own, RATES))), rtol=1e-12)
    rtol = 1e-2 if name == "explicit" else 1e-5
    np.testing.assert_allclose(found, fine, rtol=rtol, atol=1e-8)
    # Between whole steps too.
    half = jax.vmap(lambda dense: FLOW.centre(dense.evaluate(0.5)).params)(dense)
    assert bool(jnp.all(jnp.abs(half) < jnp.abs(fine[:, 0])))
    assert bool(jnp.all(jnp.abs(half) > jnp.abs(fine[:, 1])))
