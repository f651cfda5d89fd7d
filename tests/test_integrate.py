"""Runs and solved flows as trajectories: contents, counts, divergence, refusals."""

import dataclasses
from functools import partial

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import lane

import rodjax as rj

START = {"a": jnp.array([0.8, -0.6]), "b": jnp.array(1.1)}
# With the second it escapes: a run some steps after its first window; the stable
# flow, which is stable, by its solver.
RATES = jnp.array([0.1, 0.6, 0.2])
STIFF = jnp.array([0.1, 40.0, 0.2])
# The cheapest, where the solver is not the point.
EULER = {"solver": diffrax.Euler(), "substeps": 1}


def quartic(params):
    a, b = params["a"], params["b"]
    return 1.5 * a @ a + 0.5 * (jnp.sum(a) - b) ** 2 + 0.2 * b**4


def parabola(w):
    return 0.5 * jnp.sum(w**2)


SGD = rj.dynamics(optax.sgd, quartic)
BOWL = rj.dynamics(optax.sgd, parabola)
STABLE, MODULATED, ROD = (
    build(SGD) for build in (rj.flows.stable, rj.flows.modulated, rj.flows.rod)
)
close = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-14)
near = partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-14)


def plain_loop(optimizer, steps):
    """Parameters of a bare Optax loop, stacked."""
    params, state, kept = START, optimizer.init(START), [START]
    step = jax.jit(lambda p, s: optimizer.update(jax.grad(quartic)(p), s, p))
    for _ in range(steps):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        kept.append(params)
    return jax.tree.map(lambda *x: jnp.stack(x), *kept)


@pytest.mark.parametrize(
    "factory", [optax.sgd, partial(optax.sgd, momentum=0.9), optax.adam]
)
def test_descend_is_the_optax_loop(factory):
    run = rj.descend(rj.dynamics(factory, quartic), START, steps=9, lr=0.1)
    loop = plain_loop(factory(0.1), 10)
    sides = [jax.tree.map(lambda x, s=s: x[:, s], run.ends) for s in (0, 1)]
    for side, ends in enumerate(sides):
        near(ends, lane(loop, slice(side, side + 10)))
    middle = jax.tree.map(lambda x: (x[:-2] + 2.0 * x[1:-1] + x[2:]) / 4.0, loop)
    near(lane(run.params, slice(1, None)), middle)
    near(run.metrics["loss"], jax.vmap(quartic)(run.params))
    each = [jax.vmap(quartic)(ends) for ends in sides]
    near(run.metrics["mean_loss"], 0.5 * (each[0] + each[1]))
    assert float(run.evaluations) == 9 and np.isinf(run.diverged_at)
    near(run.steps, np.arange(10.0))


solves = {
    "descend": partial(rj.descend, SGD),
    "stable": partial(rj.integrate, STABLE),
    "modulated": partial(rj.integrate, MODULATED),
    "rod": partial(rj.integrate, ROD, **EULER),
}


@pytest.mark.parametrize(
    "name", ["descend", "stable", pytest.param("rod", marks=pytest.mark.slow)]
)
def test_every_thins_and_shapes_hold(name):
    full = solves[name](START, steps=6, lr=0.3)
    thin = solves[name](START, steps=6, lr=0.3, every=2)
    of = lambda path: (path.steps, path.params, path.ends, path.metrics)
    near(lane(of(full), slice(None, None, 2)), of(thin))
    near(full.final, thin.final)
    assert full.evaluations == thin.evaluations > 0
    m = 1 if name == "stable" else 2
    assert full.params["a"].shape == (7, 2) and full.params["b"].shape == (7,)
    assert full.ends["a"].shape == (7, m, 2) and full.ends["b"].shape == (7, m)
    assert {x.shape for x in full.metrics.values()} == {(7,)}
    assert set(full.metrics) == {"loss", "mean_loss", "amplitude"}
    assert full.steps[0] == (0.5 if name == "rod" else 0.0)
    near(np.diff(full.steps), np.ones(6))


def ticks():
    """A metric that counts its own calls and sees the learning rate."""
    init = lambda snapshot, *, lr: jnp.zeros(())
    update = lambda snapshot, carry, *, lr: ({"tick": carry, "rate": lr}, carry + 1)
    return rj.Metric(init, update)


@pytest.mark.parametrize("name", ["descend", "stable"])
def test_hooks(name):
    seen = []
    solve = partial(solves[name], START, steps=6, lr=0.3, every=2)
    path = solve(
        metrics=[ticks()],
        keep=lambda params: params["a"][1],
        progress=lambda step, loss: seen.append((float(step), float(loss))),
    )
    jax.effects_barrier()
    full = solve()
    near(path.params, full.params["a"][:, 1])
    near(path.ends, full.ends["a"][:, :, 1])
    near(path.metrics["tick"], np.arange(4.0))
    near(path.metrics["rate"], np.full(4, 0.3))
    near(np.array(sorted(seen)), np.stack([full.steps, full.metrics["loss"]], 1))
    nothing = jax.eval_shape(lambda: solve(keep=lambda p: None))
    assert nothing.params is None and nothing.ends is None


# --- what it costs -------------------------------------------------------------------

COUNT = [0]


def bump(_):
    COUNT[0] += 1


def counted(flow):
    """The flow, counting the calls of its field when they are made."""

    def field(t, y, lr):
        jax.debug.callback(bump, jax.tree.leaves(y)[0])
        return flow.vector_field(t, y, lr)

    return dataclasses.replace(flow, vector_field=field)


def spent(flow, steps, **options):
    """The calls made, and the evaluations that the trajectory tells of."""
    before = COUNT[0]
    path = rj.integrate(counted(flow), jnp.ones(1), steps, lr=0.3, **options)
    jax.block_until_ready(path)
    jax.effects_barrier()
    return COUNT[0] - before, float(path.evaluations)


@pytest.mark.parametrize(
    "name, solver, per_step, per_solve",
    [
        ("modulated", diffrax.Heun(), 2, 0),
        ("stable", diffrax.Euler(), 1, 0),
        ("stable", diffrax.Tsit5(), 6, 1),
        pytest.param("stable", diffrax.Heun(), 2, 0, marks=pytest.mark.slow),
        pytest.param("stable", diffrax.Dopri5(), 6, 1, marks=pytest.mark.slow),
        ("stable", diffrax.Bosh3(), 3, 1),
    ],
    ids=["modulated", "Euler", "Tsit5", "Heun", "Dopri5", "Bosh3"],
)
def test_evaluations_are_counted(name, solver, per_step, per_solve):
    flow = getattr(rj.flows, name)(BOWL)
    made, told = spent(flow, 6, every=3, substeps=4, solver=solver)
    assert made == 6 * 4 * per_step + 2 * per_solve
    assert told == made * flow.evaluations


def test_adaptive_evaluations_are_counted():
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    options = {"solver": diffrax.Tsit5(), "stepsize_controller": controller}
    made, told = spent(rj.flows.stable(BOWL), 6, every=6, **options)
    assert told == made > 0


# --- divergence ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["descend", pytest.param("stable", marks=pytest.mark.slow), "modulated"]
)
def test_diverging_lane_stays_alone(name):
    one = lambda lr: solves[name](START, steps=12, lr=lr, limit=np.inf)
    rates = STIFF if name == "stable" else RATES
    batch = jax.vmap(one)(rates)
    for i in (0, 2):
        close(lane(batch, i), one(rates[i]))
    diverged_at = np.asarray(batch.diverged_at)
    assert np.array_equal(np.isinf(diverged_at), [True, False, True])
    lost = lane(batch, 1)
    chex.assert_tree_all_finite(lost.final)
    if name == "descend":
        loop = plain_loop(optax.sgd(float(RATES[1])), 16)
        norms = jnp.stack(
            [jnp.sum(jnp.abs(x.reshape(17, -1)), 1) for x in loop.values()]
        )
        first = int(jnp.argmin(jnp.isfinite(jnp.sum(norms, 0))))
        assert diverged_at[1] == first
        # Saved up to the last window, three steps ahead of its middle, that is finite.
        bad = np.arange(13) > first - 4
    else:
        assert 0 < diverged_at[1] <= 12
        bad = np.arange(13) >= diverged_at[1]
    for x in jax.tree.leaves((lost.params, lost.ends, lost.metrics)):
        dead = np.isnan(x.reshape(13, -1))
        assert np.array_equal(dead.all(1), bad) and np.array_equal(dead.any(1), bad)
    # A dead lane costs no more.
    assert lost.evaluations < batch.evaluations[0]


# --- going on ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)]
)
def test_what_has_left_for_good_has_diverged(dtype):
    """Long before its numbers overflow, at the same step in both precisions."""
    start = jnp.ones(1, dtype)
    # w[t+1] = -2 w[t], whose midpoint is w[t] / 8 after the start's own.
    run = rj.descend(BOWL, start, 40, lr=3.0)
    assert float(run.diverged_at) == 13.0  # 2^13 / 8 is the first beyond 1000
    assert np.array_equal(np.isnan(run.metrics["loss"]), np.arange(41) >= 13)
    assert np.isinf(rj.descend(BOWL, start, 40, lr=3.0, limit=1e30).diverged_at)
    # Both must have grown: from zero the norm has from the first step on.
    pit = rj.dynamics(optax.sgd, lambda w: jnp.sum((w - 1.0) ** 2))
    assert np.isinf(rj.descend(pit, 0.0 * start, 20, lr=0.1).diverged_at)
    # A flow, w' = w, from -1/2 on.
    hill = rj.flows.stable(rj.dynamics(optax.sgd, lambda w: -0.5 * jnp.sum(w**2)))
    path = rj.integrate(hill, start, 10, lr=1.0)
    assert float(path.diverged_at) == 7.0  # e^6.9


def test_a_run_in_two_halves_is_the_run_in_one():
    """Bit for bit; of every flow in test_flows_solved.py."""
    adam = rj.dynamics(optax.adam, quartic)
    whole = rj.descend(adam, START, steps=10, lr=0.3)
    first = rj.descend(adam, START, steps=4, lr=0.3)
    second = rj.descend(adam, first.final, steps=6, lr=0.3)
    of = lambda path: (path.steps, path.params, path.ends, path.metrics)
    chex.assert_trees_all_equal(lane(of(whole), slice(5)), of(first))
    chex.assert_trees_all_equal(lane(of(whole), slice(4, None)), of(second))
    chex.assert_trees_all_equal(whole.final, second.final)


def test_a_flow_goes_on_from_a_run_and_from_itself():
    run = rj.descend(SGD, START, steps=10, lr=0.3)
    window = rj.warm_up(SGD, START, steps=4, lr=0.3)
    whole = rj.integrate(MODULATED, window, steps=6, lr=0.3)
    near(whole.steps, np.arange(4.0, 11.0))
    np.testing.assert_allclose(whole.params["a"], run.params["a"][4:], atol=0.02)
    first = rj.integrate(MODULATED, window, steps=3, lr=0.3)
    rest = rj.integrate(MODULATED, first.final, steps=3, lr=0.3)
    of = lambda path: (path.steps, path.params, path.ends, path.metrics)
    chex.assert_trees_all_equal(lane(of(whole), slice(3, None)), of(rest))
    chex.assert_trees_all_equal(whole.final, rest.final)


@pytest.mark.parametrize(
    "flow, other",
    [
        (MODULATED, STABLE),
        (STABLE, MODULATED),
        (rj.flows.edge(SGD), MODULATED),
        (ROD, rj.flows.rod(SGD, dense=True)),
        (rj.flows.covariance(SGD, rank=2), rj.flows.central(SGD)),
        # Of the same names and shapes; of the same class with another rank.
        (rj.flows.principal(SGD, rank=2), rj.flows.central(SGD, rank=2)),
        (rj.flows.covariance(SGD, rank=2), rj.flows.covariance(SGD, rank=3)),
        (ROD, rj.flows.rod(SGD, rank=2)),
        (rj.flows.stable(rj.dynamics(optax.adam, quartic)), STABLE),
    ],
)
def test_the_final_of_another_flow_is_refused(flow, other):
    y = jax.eval_shape(partial(other.init, lr=0.3, key=KEY), START)
    y = optax.tree.zeros_like(y)
    final = rj.Reached(jnp.asarray(3.0), y)
    with pytest.raises(ValueError, match="the final of another flow"):
        rj.integrate(flow, final, 2, lr=0.3)
    with pytest.raises(TypeError, match="the final of a flow"):
        rj.descend(SGD, final, 2, lr=0.3)


KEY = jax.random.key(0)


def test_key_is_the_direction_of_the_first_oscillation():
    flow, lr = MODULATED, jnp.asarray(0.3)
    y = [flow.init(START, lr=lr, key=jax.random.key(i)) for i in (0, 0, 1)]
    chex.assert_trees_all_equal(y[0], y[1])
    chex.assert_trees_all_equal(y[0].mean, y[2].mean)
    size = [float(optax.tree.norm(z.delta[0])) for z in y]
    near(size[0], size[2])
    cosine = optax.tree.vdot(y[0].delta[0], y[2].delta[0]) / size[0] ** 2
    assert abs(cosine) < 0.99
    solve = partial(rj.integrate, flow, START, steps=3, lr=0.3, **EULER)
    default, zeroth, other = (solve(key=key) for key in (None, KEY, jax.random.key(1)))
    near(default.params, other.params)
    chex.assert_trees_all_equal(zeroth.final, default.final)
    deltas = [path.final.state.delta[0]["a"] for path in (default, other)]
    assert np.max(np.abs(deltas[0] - deltas[1])) > 0
