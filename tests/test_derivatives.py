"""Derivatives through flows and runs, in both modes, against finite differences."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rodjax as rj

KEY = jax.random.key(0)
# The central flow reaches the edge of gradient descent, y = 2 / 0.3, after one step.
START = {"x": jnp.array(0.05), "y": jnp.array(6.66)}
RATES = {"sgd": 0.3, "rmsprop": 0.05, "adam": 0.05}
OPTIMIZERS = {
    "sgd": optax.sgd,
    "rmsprop": partial(optax.rmsprop, decay=0.9, eps=1e-3),
    "adam": optax.adam,
}
FLOWS = {
    "gradient": rj.flows.gradient,
    "stable": rj.flows.stable,
    "modulated": rj.flows.modulated,
    "edge": rj.flows.edge,
    "rod": rj.flows.rod,
    "central": partial(rj.flows.central, rank=1),
}


def valley(w):
    """Its sharpness y rises until the oscillation of x holds it at the edge."""
    return 0.5 * w["y"] * w["x"] ** 2 - 0.25 * w["x"] ** 4 - 0.02 * w["y"]


def end_of(params):
    """A number that all of the parameters have a share in."""
    return params["x"] + 0.7 * params["y"]


def check(reverse, forward, inputs, *, step=1e-6, rtol=1e-6):
    """A scalar's derivatives of both modes, against each other and differences."""
    flat, unravel = ravel_pytree(inputs)
    along = jnp.cos(1.0 + jnp.arange(flat.size))
    both = jax.jit(jax.value_and_grad(lambda v: reverse(unravel(v))))
    slopes = both(flat)[1]
    ahead, behind = both(flat + step * along)[0], both(flat - step * along)[0]
    size = float(jnp.linalg.norm(slopes) * jnp.linalg.norm(along))
    backwards, difference = float(slopes @ along), float(ahead - behind) / (2 * step)
    assert backwards == pytest.approx(difference, rel=0, abs=rtol * size)
    # Every input has its share in it.
    assert np.all(slopes != 0.0)
    push = jax.jit(lambda v, t: jax.jvp(lambda v: forward(unravel(v)), (v,), (t,))[1])
    assert float(push(flat, along)) == pytest.approx(backwards, rel=0, abs=1e-7 * size)


def solved(build, name, warmup, steps, *, plain, metrics=(), more=None, **options):
    """(reverse, forward) from the learning rate and parameters to where a flow leads.

    From a window after `warmup` steps, if it is not None; by diffrax alone if `plain`.
    """
    dynamics = rj.dynamics(OPTIMIZERS[name], valley)
    flow = build(dynamics)

    def of(adjoint):
        def end(inputs):
            lr, start = inputs["lr"], inputs["start"]
            if warmup is not None:
                start = rj.warm_up(dynamics, start, warmup, lr=lr)
            if plain:
                path = diffrax.diffeqsolve(
                    diffrax.ODETerm(flow.vector_field),
                    diffrax.Euler(),
                    t0=0.0,
                    t1=float(steps),
                    dt0=0.25,
                    y0=flow.init(start, lr=lr, key=KEY),
                    args=lr,
                    adjoint=adjoint,
                    max_steps=4 * steps + 1,
                )
                return end_of(
                    flow.centre(jax.tree.map(lambda x: x[-1], path.ys)).params
                )
            path = rj.integrate(
                *(flow, start, steps),
                lr=lr,
                adjoint=adjoint,
                metrics=[metric(dynamics) for metric in metrics],
                **options,
            )
            end = end_of(jax.tree.map(lambda x: x[-1], path.params))
            return end if more is None else end + more(path.metrics)

        return end

    # `integrate` chooses the first by itself.
    backwards = diffrax.RecursiveCheckpointAdjoint() if plain else None
    return of(backwards), of(diffrax.ForwardMode())


def inputs_of(name):
    return {"lr": jnp.array(RATES[name]), "start": START}


# In one program each; what else there is follows in the slow ones below.
@pytest.mark.parametrize(
    "flow, name, warmup",
    [
        pytest.param("gradient", "sgd", None, marks=pytest.mark.slow),
        ("modulated", "sgd", None),
        pytest.param("edge", "sgd", 2, marks=pytest.mark.slow),
        pytest.param("stable", "adam", None, marks=pytest.mark.slow),
        pytest.param("rod", "sgd", None, marks=pytest.mark.slow),
        pytest.param("edge", "adam", None, marks=pytest.mark.slow),
        # Which asks for an eigenpair and for eigenvalues of the update map.
        pytest.param("modulated", "adam", 2, marks=pytest.mark.slow),
    ],
)
def test_through_diffrax(flow, name, warmup):
    check(*solved(FLOWS[flow], name, warmup, 6, plain=True), inputs_of(name))


def test_through_integrate_with_all_that_is_recorded():
    more = lambda metrics: sum(values[-1] for values in metrics.values())
    metrics = {"metrics": [rj.edge_of_stability], "more": more, "every": 3}
    functions = solved(FLOWS["stable"], "sgd", None, 6, plain=False, **metrics)
    check(*functions, inputs_of("sgd"))


@pytest.mark.slow
def test_through_the_central_flow_onto_its_edge():
    options = {"every": 2, "solver": diffrax.Euler()}
    functions = solved(FLOWS["central"], "sgd", None, 2, plain=False, **options)
    check(*functions, inputs_of("sgd"))


PRECONDITIONED = [(flow, name) for flow in FLOWS for name in ("rmsprop", "adam")]


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("warmup", [None, 2])
@pytest.mark.parametrize("flow, name", [*((f, "sgd") for f in FLOWS), *PRECONDITIONED])
def test_every_flow_both_ways(flow, name, warmup, plain):
    if (name != "sgd" and flow == "gradient") or (flow, name) == ("central", "adam"):
        pytest.skip("not a flow of this optimizer")
    central = flow == "central"
    build = partial(rj.flows.central, rank=2) if central else FLOWS[flow]
    # Held at the edge it soon forgets where it is from; it has noise from the solver
    # of its complementarity problem, where the modulated flow has kinks.
    steps, step = (2, 1e-6) if central else (6, 1e-7)
    functions = solved(build, name, warmup, steps, plain=plain)
    check(*functions, inputs_of(name), step=step)


@pytest.mark.parametrize("name", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_through_runs(name):
    dynamics = rj.dynamics(OPTIMIZERS[name], valley)

    def end(inputs):
        lr = inputs["lr"]
        window = rj.warm_up(dynamics, inputs["start"], 3, lr=lr)
        metrics = [rj.edge_of_stability(dynamics)]
        run = rj.descend(dynamics, window, 4, lr=lr, every=2, metrics=metrics)
        final = end_of(run.final.at(3).params)
        return final + sum(values[-1] for values in run.metrics.values())

    check(end, end, inputs_of(name))


def test_sharpness_along_its_gradient():
    loss = lambda w: jnp.sum(w["a"] ** 4) + jnp.sum(w["a"]) ** 2 * w["b"] ** 2
    params = {"a": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.7)}
    slope = jax.jit(jax.grad(lambda w: rj.sharpness(loss, w).value))(params)
    vector = rj.sharpness(loss, params).vector
    expected = rj.third_derivative(loss, params, vector, vector)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), slope, expected)


def test_a_second_moment_of_zero_has_no_derivative_without_an_epsilon():
    # A unit that is dead: its gradient is zero, not by its formula but by its value.
    loss = lambda w: jnp.sum(w[0] ** 2) + w[0] * jnp.maximum(w[1], 0.0) ** 2
    start = jnp.array([1.0, -1.0])

    def slope(optimizer):
        dynamics = rj.dynamics(optimizer, loss)
        run = lambda lr: rj.descend(dynamics, start, 3, lr=lr).params[-1].sum()
        return jax.grad(run)(0.1)

    assert np.isnan(slope(optax.adam))
    # Three steps of -lr, at first order.
    assert slope(partial(optax.adam, eps_root=1e-16)) == pytest.approx(-3.0, rel=0.05)


def test_forward_mode_without_its_adjoint_names_it():
    flow = rj.flows.gradient(rj.dynamics(optax.sgd, valley))
    solve = lambda lr: rj.integrate(flow, START, 1, lr=lr).params["x"][-1]
    with pytest.raises(TypeError, match=r"adjoint=diffrax.ForwardMode\(\)"):
        jax.jvp(solve, (0.3,), (1.0,))
