"""Runs and solved flows as trajectories: contents, counts, divergence, refusals."""

from functools import lru_cache, partial

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import _modulated as modulated, _rod as rod, _stable as stable

START = {"a": jnp.array([0.8, -0.6]), "b": jnp.array(1.1)}
# With the second it escapes: a run some steps after its first window; the stable
# flow, which is stable, by its solver.
RATES = jnp.array([0.1, 0.6, 0.2])
STIFF = jnp.array([0.1, 40.0, 0.2])


def quartic(params):
    a, b = params["a"], params["b"]
    return 1.5 * a @ a + 0.5 * (jnp.sum(a) - b) ** 2 + 0.2 * b**4


SGD = rj.dynamics(optax.sgd, quartic)
STABLE, MODULATED, ROD = stable(SGD), modulated(SGD), rod(SGD)
close = lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-14)
near = lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-14)


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
    for side in (0, 1):
        ends = jax.tree.map(lambda x, side=side: x[:, side], run.ends)
        jax.tree.map(near, ends, jax.tree.map(lambda x, s=side: x[s : s + 10], loop))
    middle = jax.tree.map(lambda x: (x[:-2] + 2.0 * x[1:-1] + x[2:]) / 4.0, loop)
    jax.tree.map(lambda a, b: near(a[1:], b), run.params, middle)
    near(run.metrics["loss"], jax.vmap(quartic)(run.params))
    each = [
        jax.vmap(quartic)(jax.tree.map(lambda x, s=s: x[:, s], run.ends))
        for s in (0, 1)
    ]
    near(run.metrics["mean_loss"], 0.5 * (each[0] + each[1]))
    assert float(run.evaluations) == 9 and np.isnan(run.diverged_at)
    near(run.steps, np.arange(10.0))


solves = {
    "descend": partial(rj.descend, SGD, lr=0.3),
    "stable": partial(rj.integrate, STABLE, lr=0.3),
    "modulated": partial(rj.integrate, MODULATED, lr=0.3),
    "rod": partial(rj.integrate, ROD, lr=0.3),
}


@pytest.mark.parametrize("name", ["descend", "stable", "rod"])
def test_every_thins_and_shapes_hold(name):
    full = solves[name](START, steps=6)
    thin = solves[name](START, steps=6, every=3)
    same = lambda a, b: near(a[::3], b)
    chex.assert_trees_all_equal(full.steps[::3], thin.steps)
    jax.tree.map(same, full.params, thin.params)
    jax.tree.map(same, full.ends, thin.ends)
    jax.tree.map(same, full.metrics, thin.metrics)
    jax.tree.map(near, full.final, thin.final)
    assert full.evaluations == thin.evaluations > 0
    m = 1 if name == "stable" else 2
    assert full.params["a"].shape == (7, 2) and full.params["b"].shape == (7,)
    assert full.ends["a"].shape == (7, m, 2) and full.ends["b"].shape == (7, m)
    assert {x.shape for x in full.metrics.values()} == {(7,)}
    assert set(full.metrics) == {"loss", "mean_loss", "amplitude"}
    assert full.steps[0] == (0.5 if name == "rod" else 0.0)
    near(np.diff(full.steps), 1.0)


def ticks():
    """A metric that counts its own calls and sees the learning rate."""
    init = lambda snapshot, lr: jnp.zeros(())
    update = lambda snapshot, carry, lr: ({"tick": carry, "rate": lr}, carry + 1)
    return rj.Metric(init, update)


@pytest.mark.parametrize("name", ["descend", "stable"])
def test_hooks(name):
    seen = []
    progress = lambda step, loss: seen.append((float(step), float(loss)))
    project = lambda params: params["a"][1]
    path = solves[name](
        START, steps=6, every=2, metrics=[ticks()], project=project, progress=progress
    )
    jax.effects_barrier()
    full = solves[name](START, steps=6, every=2)
    near(path.params, full.params["a"][:, 1])
    near(path.ends, full.ends["a"][:, :, 1])
    near(path.metrics["tick"], np.arange(4.0))
    near(path.metrics["rate"], np.full(4, 0.3))
    near(sorted(seen), np.stack([full.steps, full.metrics["loss"]], 1))
    nothing = solves[name](START, steps=6, every=2, project=lambda p: None)
    assert nothing.params is None and nothing.ends is None


COUNT = [0]


@lru_cache
def counted(name):
    """A flow that counts the calls of its field when they are made."""
    flow = {"stable": STABLE, "modulated": MODULATED}[name]

    def bump(_):
        COUNT[0] += 1

    def field(t, y, lr):
        jax.debug.callback(bump, jax.tree.leaves(y)[0])
        return flow.vector_field(t, y, lr)

    return flow._replace(vector_field=field)


@pytest.mark.parametrize(
    "name, solver, per_step, per_solve",
    [
        ("modulated", diffrax.Heun(), 2, 0),
        ("stable", diffrax.Euler(), 1, 0),
        ("stable", diffrax.Heun(), 2, 0),
        ("stable", diffrax.Tsit5(), 6, 1),
        ("stable", diffrax.Dopri5(), 6, 1),
        ("stable", diffrax.Bosh3(), 3, 1),
    ],
    ids=["modulated", "Euler", "Heun", "Tsit5", "Dopri5", "Bosh3"],
)
def test_evaluations_are_counted(name, solver, per_step, per_solve):
    flow, before = counted(name), COUNT[0]
    path = rj.integrate(
        flow, START, steps=6, every=3, lr=0.1, substeps=4, solver=solver
    )
    jax.block_until_ready(path)
    jax.effects_barrier()
    calls = 6 * 4 * per_step + 2 * per_solve
    assert float(path.evaluations) == calls * flow.evaluations
    assert COUNT[0] - before == calls


def test_adaptive_evaluations_are_counted():
    flow, before = counted("stable"), COUNT[0]
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    path = rj.integrate(
        flow, START, 6, lr=0.3, every=6, solver=diffrax.Tsit5(), controller=controller
    )
    jax.block_until_ready(path)
    jax.effects_barrier()
    assert float(path.evaluations) == COUNT[0] - before > 0


def test_uncountable_solver_says_so():
    solver = diffrax.LeapfrogMidpoint()
    path = rj.integrate(STABLE, START, 2, lr=0.1, solver=solver)
    assert np.isnan(path.evaluations) and np.isnan(path.diverged_at)


@pytest.mark.parametrize("name", ["descend", "stable", "modulated"])
def test_diverging_lane_stays_alone(name):
    one = lambda lr: solves[name](START, steps=12, lr=lr)
    rates = STIFF if name == "stable" else RATES
    batch = jax.vmap(one)(rates)
    for i in (0, 2):
        jax.tree.map(lambda a, b, i=i: close(a[i], b), batch, one(rates[i]))
    diverged_at = np.asarray(batch.diverged_at)
    assert np.array_equal(np.isnan(diverged_at), [True, False, True])
    lane = jax.tree.map(lambda x: x[1], batch)
    chex.assert_tree_all_finite(lane.final)
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
    for x in jax.tree.leaves((lane.params, lane.ends, lane.metrics)):
        dead = np.isnan(x.reshape(13, -1))
        assert np.array_equal(dead.all(1), bad) and np.array_equal(dead.any(1), bad)
    # A dead lane costs no more.
    assert lane.evaluations < batch.evaluations[0]


def test_going_on_from_a_window_is_one_run():
    whole = rj.descend(SGD, START, steps=10, lr=0.3)
    first = rj.descend(SGD, START, steps=4, lr=0.3)
    second = rj.descend(SGD, first.final, steps=6, lr=0.3)
    keep = lambda path, rows: jax.tree.map(
        lambda x: x[rows], (path.steps, path.params, path.ends, path.metrics)
    )
    jax.tree.map(near, keep(whole, slice(4, None)), keep(second, slice(None)))
    jax.tree.map(near, whole.final, second.final)
    # A flow takes over at the window's step.
    path = rj.integrate(MODULATED, first.final, steps=6, lr=0.3)
    near(path.steps, np.arange(4.0, 11.0))
    np.testing.assert_allclose(path.params["a"], whole.params["a"][4:], atol=0.02)


def test_key_is_the_direction_of_the_seed():
    flow, lr = MODULATED, jnp.asarray(0.3)
    y = [flow.init(START, lr=lr, key=jax.random.key(i)) for i in (0, 0, 1)]
    chex.assert_trees_all_equal(y[0], y[1])
    chex.assert_trees_all_equal(y[0].mean, y[2].mean)
    size = [float(optax.tree.norm(z.delta[0])) for z in y]
    near(size[0], size[2])
    cosine = optax.tree.vdot(y[0].delta[0], y[2].delta[0]) / size[0] ** 2
    assert abs(cosine) < 0.99
    default, other = (
        rj.integrate(flow, START, steps=3, lr=0.3, key=key)
        for key in (None, jax.random.key(1))
    )
    jax.tree.map(near, default.params, other.params)
    zeroth = rj.integrate(flow, START, steps=3, lr=0.3, key=jax.random.key(0))
    chex.assert_trees_all_equal(zeroth.final, default.final)
    assert np.max(np.abs(default.final.delta[0]["a"] - other.final.delta[0]["a"])) > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be a positive multiple"),
        ({"steps": -3}, "steps must be a positive multiple"),
        ({"steps": 5, "every": 2}, "steps must be a positive multiple of every=2"),
        ({"steps": 4, "every": 0}, "every must be at least 1"),
        ({"steps": 4, "substeps": 0}, "substeps must be at least 1"),
        ({"steps": 4, "lr": None}, "lr is missing"),
    ],
)
def test_refusals(options, message):
    options = {"lr": 0.1} | options
    with pytest.raises(ValueError, match=message):
        rj.integrate(STABLE, START, **options)
    if "substeps" not in options:
        with pytest.raises(ValueError, match=message):
            rj.descend(SGD, START, **options)
