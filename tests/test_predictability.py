"""The predictability limit: nudges that a linear map carries on, and their median."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import coupled, lane

import rodjax as rj
from rodjax.solve import _predictability as module

SGD = partial(rj.dynamics, optax.sgd)
ULP = 2.0**-52  # Of numbers from 1 to 2.
# At rest where the loss has its minimum, whence whole multiples of ULP are exact.
REST = jnp.array([1.5, 1.25, -1.75])
UPDATE = np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 1.0], [0.0, 1.0, 1.0]])


def resting(w):
    """Gradient descent with lr 1 multiplies what is off by UPDATE."""
    off = w - REST.astype(w.dtype)
    return 0.5 * off @ jnp.asarray(np.eye(3) - UPDATE, w.dtype) @ off


def signs(seed, draws):
    """The nudges, in units of ULP."""
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(draws)]
    return [np.asarray((module.nudged(REST, key) - REST) / ULP) for key in keys]


def carried_on(nudge, steps):
    """Distances of the midpoints, by dense linear algebra."""
    powers = [np.linalg.matrix_power(UPDATE, t) for t in range(steps + 2)]
    off = [np.zeros(3), *(power @ nudge for power in powers)]
    triples = zip(off, off[1:], off[2:], strict=False)
    return ULP * np.array([np.linalg.norm(a + 2 * b + c) / 4 for a, b, c in triples])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_map_carries_the_nudge_and_the_median_counts(seed):
    found = rj.predictability(SGD(resting), REST, 24, lr=1.0, seed=seed)
    each = [carried_on(nudge, 24) for nudge in signs(seed, 3)]
    # Midpoints are rounded, to an ULP in each coordinate.
    expected = np.median(each, axis=0)
    np.testing.assert_allclose(found.distance, expected, rtol=1e-9, atol=2 * ULP)
    assert found.distance[-1] > 1e6 * ULP
    # The run itself stays where it is.
    np.testing.assert_array_equal(found.run["amplitude"], 0.0)
    assert float(found.evaluations) == (1 + 3) * 24
    assert np.isinf(found.diverged_at)


def test_seeds_draw_other_signs_and_more_draws_begin_with_the_same():
    first, second = (np.stack(signs(seed, 3)) for seed in (0, 1))
    assert np.all(abs(first) == 1) and np.all(abs(second) == 1)
    assert np.any(first != second)
    np.testing.assert_array_equal(first, np.stack(signs(0, 5))[:3])
    assert len(np.unique(first, axis=0)) > 1


def test_below_the_threshold_the_limit_is_that_of_rounding():
    rotation = np.linalg.qr(np.arange(9.0).reshape(3, 3) ** 2 + np.eye(3))[0]
    hessian = rotation @ np.diag([0.2, 1.0, 3.0]) @ rotation.T
    sgd, start = SGD(lambda w: 0.5 * w @ jnp.asarray(hessian) @ w), 1.1 * jnp.ones(3)
    found = rj.predictability(sgd, start, 80, lr=0.5)
    update = np.eye(3) - 0.5 * hessian
    sizes = [
        np.linalg.norm(np.linalg.matrix_power(update, t) @ start) for t in range(83)
    ]
    # What every step rounds, a few units of each number, shrinks as all else does.
    shrunk = np.max(abs(np.linalg.eigvalsh(update)))
    bound = [3**0.5 * ULP]
    for size in sizes[:-1]:
        bound.append(shrunk * bound[-1] + 8 * ULP * size)
    assert np.all(found.distance <= 2 * np.array(bound[:81]))
    assert found.distance[0] > 0 and found.distance[-1] < 0.01 * found.distance[0]


def test_beyond_the_threshold_it_grows_as_the_oscillation_does():
    # Near the minimum, whose own numbers are rounded.
    curvatures, start = jnp.array([1.0, 0.3]), jnp.array([1.1, 1.3]) + 1e-9
    sgd = SGD(lambda w: 0.5 * jnp.sum(curvatures * (w - jnp.array([1.1, 1.3])) ** 2))
    rates = jnp.array([2.4, 2.5, 3.0])
    nudge = lambda lr: rj.predictability(sgd, start, 60, lr=lr, every=2, limit=jnp.inf)
    found = jax.jit(jax.vmap(nudge))(rates)
    assert found.distance.shape == (3, 31)
    for lr, distance, steps in zip(rates, found.distance, found.steps, strict=True):
        slope = np.polyfit(steps[15:], np.log(distance[15:]), 1)[0]
        assert slope == pytest.approx(np.log(lr - 1), rel=0.02)
    alone = nudge(2.5)
    np.testing.assert_allclose(found.distance[1], alone.distance, rtol=1e-12)
    assert lane(found, 1).summary() == pytest.approx(alone.summary(), nan_ok=True)


def test_without_a_nudge_the_distance_is_zero_and_the_run_is_that_of_descend(
    monkeypatch,
):
    monkeypatch.setattr(module, "nudged", lambda params, key: params)
    x = jax.random.normal(jax.random.key(0), (7, 5))
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - x[:, :2]) ** 2)
    params = {"w": jnp.ones((5, 6)).at[0].set(0.3), "v": 0.1 * jnp.ones((6, 2))}
    heavy_ball = rj.dynamics(partial(optax.sgd, momentum=0.9), loss)
    nudge = lambda lr: rj.predictability(heavy_ball, params, 12, lr=lr, every=3)
    found, run = nudge(0.1), rj.descend(heavy_ball, params, 12, lr=0.1, every=3)
    assert np.all(found.distance == 0.0)
    assert np.all(jax.vmap(nudge)(jnp.array([0.1, 0.4])).distance == 0.0)
    np.testing.assert_allclose(found.run["loss"], run.metrics["loss"], rtol=1e-12)
    np.testing.assert_array_equal(found.steps, run.steps)


def test_nudged_runs_that_diverge_are_told_as_of_a_flow():
    found = rj.predictability(SGD(resting), REST, 45, lr=1.0, limit=10.0)
    lost = []
    for nudge in signs(0, 3):
        powers = [np.linalg.matrix_power(UPDATE, t) for t in range(47)]
        off = ULP * np.array([np.zeros(3), *(power @ nudge for power in powers)])
        middles = np.asarray(REST) + (off[:-2] + 2 * off[1:-1] + off[2:]) / 4
        sizes = np.linalg.norm(middles, axis=1)
        lost.append(int(np.argmax(sizes > 10.0 * sizes[0])))
    expected = int(np.median(lost))
    assert 0 < expected < 45 and float(found.diverged_at) == expected
    np.testing.assert_array_equal(np.isnan(found.distance), found.steps >= expected)
    assert found.summary()["final_distance"] == found.distance[expected - 1]
    np.testing.assert_array_equal(np.isnan(found.flow["loss"]), found.steps >= expected)
    assert np.all(found.run["loss"] == 0.0)


def test_a_sweep_has_the_limit_of_every_lane():
    sgd, common = SGD(resting), {"every": 4, "limit": 10.0}
    data = rj.sweep(
        sgd, REST, 24, grid={"lr": [1.0, 2.0]}, warmup=2, predictability=True,
        time_chunk=8, **common,
    )  # fmt: skip
    assert data.flow.values.tolist() == ["run", "limit"]
    for lr in (1.0, 2.0):
        own = data.sel(lr=lr, flow="limit")
        alone = rj.predictability(
            sgd, rj.warm_up(sgd, REST, 2, lr=lr), 24, lr=lr, **common
        )
        np.testing.assert_allclose(own.distance, alone.distance, rtol=1e-12)
        assert own.evaluations == alone.evaluations
        summary = alone.summary()
        assert float(own.final_distance) == pytest.approx(summary["final_distance"])
        np.testing.assert_equal(float(own.diverged_at), summary["diverged_at"])
    assert np.isnan(data.diverged_at.sel(lr=1.0, flow="limit"))
    assert np.isfinite(data.diverged_at.sel(lr=2.0, flow="limit"))
    assert np.all(np.isnan(data.loss.sel(flow="limit")))
    figure = rj.plot_sweep(data)
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [
        "run",
        "limit",
    ]
    with pytest.raises(ValueError, match="'limit' is the name of the predictability"):
        flows = {"limit": rj.flows.stable(sgd)}
        grid = {"lr": [1.0]}
        rj.sweep(sgd, REST, 4, grid=grid, flows=flows, predictability=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_one_unit_in_the_last_place_of_the_parameters_own_dtype(dtype):
    params = {"a": jnp.array([1.5, -0.75, 100.0], dtype), "b": jnp.array(-3.0, dtype)}
    moved = module.nudged(params, jax.random.key(0))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert y.dtype == x.dtype
        exact = np.asarray(x, float)
        unit = 2.0 ** np.floor(np.log2(abs(exact))) * float(jnp.finfo(dtype).eps)
        np.testing.assert_array_equal(abs(np.asarray(y, float) - exact), unit)


def test_the_limit_of_a_run_in_half_precision_is_that_of_its_rounding():
    params = {
        "a": jnp.array([1.5, -0.75], "bfloat16"),
        "b": jnp.array(-3.0, "bfloat16"),
    }
    loss = lambda p: 0.5 * jnp.sum(p["a"] ** 2) + p["b"] ** 2
    found = rj.predictability(SGD(loss), params, 3, lr=0.1)
    # Of midpoints, which are in single precision.
    assert found.distance.dtype == "float32"
    assert 0 < found.distance[0] < 8 * float(jnp.finfo("bfloat16").eps)


def test_the_median_counts_a_run_that_is_gone_as_furthest():
    nan = jnp.nan
    values = jnp.array([[1.0, 2.0, 3.0], [nan, 2.0, 1.0], [nan, nan, 1.0]])
    np.testing.assert_array_equal(module.median(values, axis=1), [2.0, 2.0, nan])


def test_what_cannot_be_nudged_is_refused():
    start = {"a": jnp.ones(3), "b": jnp.ones(())}
    nudge = partial(rj.predictability, SGD(coupled), start, lr=0.1)
    for options, message in (
        ({"steps": 4, "draws": 2}, "draws must be odd.* got 2"),
        ({"steps": 4, "draws": 0}, "draws must be odd"),
        ({"steps": 4, "every": 3}, "positive multiple of every=3"),
        ({"steps": 4, "keep": lambda p: None}, "keep= has kept no parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            nudge(**options)
    path = rj.integrate(rj.flows.stable(SGD(coupled)), start, 1, lr=0.1)
    with pytest.raises(TypeError, match="final of a flow"):
        rj.predictability(SGD(coupled), path.final, 4, lr=0.1)
