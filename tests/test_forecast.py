"""Forecasts over a grid of learning rates, and records of a training loop as runs."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Traced, unchecked
from matplotlib.figure import Figure

import rodjax as rj

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
RATES = [0.05, 0.1, 0.3, 3.0]
STEPS = 20


def loss(params):
    curved = jnp.array([4.0, 0.5])
    return 0.5 * params["a"] @ (curved * params["a"]) + jnp.log(jnp.cosh(params["b"]))


HEAVY = partial(optax.sgd, momentum=0.5)
DYNAMICS = rj.dynamics(HEAVY, loss)
OLD = 0.02
forecast = partial(rj.training.forecast, DYNAMICS)


@lru_cache
def start():
    """From a run of ten steps at the old learning rate."""
    optimizer, params = HEAVY(OLD), PARAMS
    opt_state = optimizer.init(params)
    for _ in range(10):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
    return rj.training.window(DYNAMICS, params, opt_state, step=10, lr=OLD)


@lru_cache
def found():
    return forecast(start(), STEPS, lrs=RATES[::-1], runs=True, every=5)


# --- what is in it -------------------------------------------------------------------


def test_a_forecast_is_labelled():
    data = found()
    assert data.flow.values.tolist() == ["run", "stable", "modulated"]
    np.testing.assert_array_equal(data.lr, RATES)
    assert data.step.values.tolist() == [13.0, 18.0, 23.0, 28.0, 33.0]
    for name in ("loss", "mean_loss", "amplitude", "sharpness_ratio"):
        assert data[name].dims == ("flow", "lr", "step")
        assert data[name].attrs["long_name"]
    assert data.end_loss.dims == data.diverged_at.dims == ("flow", "lr")
    assert data.attrs["steps"] == STEPS and data.attrs["solver"] == "default"


def test_every_lane_is_what_integrate_and_descend_compute():
    data, edge = found(), rj.edge_of_stability(DYNAMICS)
    options = {"every": 5, "metrics": [edge]}
    for lr in RATES[:3]:
        run = rj.descend(DYNAMICS, start(), STEPS, lr=lr, **options)
        flow = rj.flows.modulated(DYNAMICS)
        path = rj.integrate(flow, start(), STEPS, lr=lr, **options)
        for name, of in (("run", run), ("modulated", path)):
            lane = data.sel(flow=name, lr=lr)
            for key, values in of.metrics.items():
                if key != "residual":
                    # Where an oscillation that decays points to is chaotic.
                    np.testing.assert_allclose(lane[key], values, rtol=1e-6, atol=1e-7)
            assert np.isnan(lane.diverged_at)
            np.testing.assert_allclose(lane.evaluations, of.evaluations)


def test_the_run_is_that_of_optax():
    """Plain steps at the new learning rate, from the last state of the window."""
    params, opt_state = rj.optimizer.merge(start().at(3))
    for lr in RATES[:2]:
        new = HEAVY(lr)
        w, state = params, opt_state
        for _ in range(STEPS - 3):
            updates, state = new.update(jax.grad(loss)(w), state)
            w = optax.apply_updates(w, updates)
        after, _ = new.update(jax.grad(loss)(w), state)
        mean = (loss(w) + loss(optax.apply_updates(w, after))) / 2
        np.testing.assert_allclose(found().end_loss.sel(flow="run", lr=lr), mean)


def test_the_largest_learning_rate_without_divergence():
    data = found()
    assert data.largest_lr.sel(flow="run") == 0.3
    assert data.diverged_at.sel(flow="run", lr=3.0).notnull()
    assert np.isnan(data.end_loss.sel(flow="run", lr=3.0))
    lost = forecast(start(), 20, lrs=[3.0, 9.0], flows=[], runs=True, metrics=())
    assert np.isnan(lost.largest_lr.sel(flow="run"))


def test_moments_are_as_few_as_leave_twenty():
    steps = lambda n: (
        forecast(start(), n, lrs=[0.1], flows=["stable"], metrics=()).step.size
    )
    assert [steps(n) for n in (100, 21)] == [21, 22]


def test_parameters_are_a_start_too():
    data = forecast(PARAMS, 4, lrs=[0.1], flows=["stable"], metrics=(), every=2)
    path = rj.integrate(rj.flows.stable(DYNAMICS), PARAMS, 4, lr=0.1, every=2)
    np.testing.assert_allclose(data.mean_loss[0, 0], path.metrics["mean_loss"])
    assert data.step.values.tolist() == [0.0, 2.0, 4.0]


def test_flows_of_ones_own_and_chunks_of_lanes():
    flows = {"pair": rj.flows.rod(DYNAMICS), "plain": rj.flows.stable(DYNAMICS)}
    options = {"lrs": RATES[:3], "flows": flows, "metrics": ()}
    whole = forecast(start(), 4, **options)
    parts = forecast(start(), 4, lane_chunk=2, **options)
    assert whole.flow.values.tolist() == ["pair", "plain"]
    # The rod's are of half-step midpoints.
    assert whole.step.values.tolist() == [13.0, 14.0, 15.0, 16.0, 17.0]
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-12)


def test_it_compiles_once():
    traced = Traced(loss)
    dynamics = rj.dynamics(optax.sgd, traced)
    ahead = partial(rj.training.forecast, dynamics, steps=4, metrics=())
    params = jax.tree.map(jnp.copy, PARAMS)
    ahead(start=params, lrs=[0.1, 0.2])
    before = traced.count
    ahead(start=jax.tree.map(lambda x: 2 * x, params), lrs=[0.3, 0.4])
    # The two evaluations that tell whether it draws at random.
    assert traced.count == before + 2


@pytest.mark.slow
def test_a_learning_rate_in_the_state_is_set():
    factory = lambda lr: optax.inject_hyperparams(optax.adam)(learning_rate=lr)
    injected, plain = rj.dynamics(factory, loss), rj.dynamics(optax.adam, loss)
    for dynamics, optimizer in ((injected, factory), (plain, optax.adam)):
        opt_state = optimizer(0.1).init(PARAMS)
        begun = rj.training.window(dynamics, PARAMS, opt_state, step=0, lr=0.1)
        data = rj.training.forecast(
            dynamics, begun, 10, lrs=[0.01, 0.2], runs=True, metrics=()
        )
        if dynamics is injected:
            first = data
    assert np.all(first.end_loss[:, 0] > 1.5 * first.end_loss[:, 1])
    np.testing.assert_allclose(first.end_loss, data.end_loss, rtol=1e-9)


def test_a_schedule_goes_on_from_its_place():
    factory = lambda lr: optax.sgd(optax.linear_schedule(lr, 0.0, 10))
    dynamics = rj.dynamics(factory, loss)
    opt_state = factory(0.1).init(PARAMS)
    late = jax.tree.map(lambda x: x + 40, opt_state)
    begun = rj.training.window(dynamics, PARAMS, late, step=40, lr=0.1)
    data = rj.training.forecast(
        dynamics, begun, 4, lrs=[0.1, 0.2], runs=True, metrics=()
    )
    np.testing.assert_allclose(data.end_loss, float(loss(PARAMS)))


# --- in print, and drawn -------------------------------------------------------------


def test_the_table_has_a_row_for_each_learning_rate():
    head, names, *rows, last = rj.training.table(found()).splitlines()
    assert head == "steps 13 to 33; loss at the end, sharpness over threshold"
    assert names.split() == ["lr", "run", "stable", "modulated"]
    assert [row.split()[0] for row in rows] == ["0.05", "0.1", "0.3", "3"]
    assert "diverged at step" in rows[-1]
    assert last.split()[:3] == ["largest", "lr", "0.3"]


@pytest.mark.parametrize("runs", [True, False])
def test_the_picture(runs):
    data = found() if runs else found().sel(flow=["stable", "modulated"])
    figure = rj.plot_forecast(data, title="from step 13")
    assert isinstance(figure, Figure)
    end, ratio = figure.axes
    shown = [text.get_text() for text in ratio.get_legend().get_texts()]
    assert shown[: data.flow.size] == data.flow.values.tolist()
    assert end.get_yscale() == "log" and ratio.get_xlabel() == "learning rate"
    # Where the run diverged.
    assert bool(end.patches) == runs


def test_the_picture_of_one_learning_rate_without_sharpness():
    data = forecast(start(), 4, lrs=[0.1], flows=["stable"], metrics=())
    _, ratio = rj.plot_forecast(data).axes
    assert (
        not ratio.lines[0].get_ydata().size
        or np.isnan(ratio.lines[0].get_ydata()).all()
    )


# --- refusals ------------------------------------------------------------------------


def test_bad_arguments_are_refused():
    for options, message in (
        ({"lrs": []}, "one at least"),
        ({"lrs": [[0.1]]}, "one dimension"),
        ({"lrs": [0.1, np.nan]}, "finite"),
        ({"lrs": [0.1, -0.2]}, "positive, got -0.2"),
        ({"lrs": [0.1], "every": 3}, "multiple of every=3"),
        ({"lrs": [0.1], "flows": ["unknown"]}, "no 'unknown', only stable, rod"),
        ({"lrs": [0.1], "flows": {"run": None}}, "optimizer's own"),
        ({"lrs": [0.1], "lane_chunk": 0}, "lane_chunk"),
        ({"lrs": [0.1], "flows": [], "runs": False}, "nothing to forecast"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            forecast(start(), 4, **options)
    other = rj.flows.stable(rj.dynamics(optax.adam, loss))
    with pytest.raises(ValueError, match="other dynamics"):
        forecast(start(), 4, lrs=[0.1], flows={"other": other})
    made = rj.dynamics(optax.sgd(0.1), loss)
    with pytest.raises(ValueError, match="already has its learning rate"):
        rj.training.forecast(made, PARAMS, 4, lrs=[0.1])


def test_a_loss_that_draws_at_random_is_refused():
    rng = np.random.default_rng(0)

    def drawn(params):
        draw = jax.pure_callback(rng.normal, jax.ShapeDtypeStruct((), float))
        return loss(params) * (1 + draw)

    dynamics = rj.dynamics(optax.sgd, drawn)
    with pytest.raises(ValueError, match=r"draws at random.*full-batch"):
        rj.training.forecast(dynamics, PARAMS, 4, lrs=[0.1])


# --- records of a training loop ------------------------------------------------------

SGD = rj.dynamics(optax.sgd(0.3), loss)


def iterates(steps):
    path = [PARAMS]
    for _ in range(steps):
        grads = jax.grad(loss)(path[-1])
        path.append(jax.tree.map(lambda w, g: w - 0.3 * g, path[-1], grads))
    return path


PATH = iterates(12)
recorded = rj.training.recorded


def test_records_are_the_run_of_a_comparison():
    run = recorded(loss, iter(list(enumerate(PATH))))
    full = rj.descend(SGD, PARAMS, 11)
    flow = rj.integrate(rj.flows.modulated(SGD), PARAMS, 12)
    assert run.steps.tolist() == list(range(1, 12))
    ours = rj.compare(run, flow)
    theirs = rj.compare(full, rj.integrate(flow_of(), PARAMS, 11))
    np.testing.assert_allclose(ours.distance, theirs.distance[1:], rtol=1e-9)
    for name in ("loss", "mean_loss"):
        np.testing.assert_allclose(ours.run[name], theirs.run[name][1:], rtol=1e-12)
        np.testing.assert_allclose(ours.flow[name], theirs.flow[name][1:], rtol=1e-12)
    flips = jax.tree.map(lambda x, y, z: (x - 2 * y + z) / 4, *PATH[4:7])
    np.testing.assert_allclose(ours.run["amplitude"][4], optax.tree.norm(flips))
    assert "final_distance" in str(ours)


def flow_of():
    return rj.flows.modulated(SGD)


def test_records_here_and_there():
    run = recorded(loss, [(t, PATH[t]) for t in (1, 2, 3, 8, 9, 10)])
    assert run.steps.tolist() == [2.0, 9.0]
    whole = recorded(loss, enumerate(PATH))
    for name in ("loss", "amplitude"):
        np.testing.assert_array_equal(
            run.metrics[name], whole.metrics[name][jnp.array([1, 8])]
        )
    half = rj.integrate(rj.flows.rod(SGD), PARAMS, 12)
    middle = jax.tree.map(lambda x, y: (x + y) / 2, PATH[9], PATH[10])
    gap = optax.tree.norm(
        optax.tree.sub(jax.tree.map(lambda x: x[9], half.params), middle)
    )
    np.testing.assert_allclose(rj.compare(run, half).distance[1], gap)
    data = rj.dataset(
        run, {"rod": half, "modulated": rj.integrate(flow_of(), PARAMS, 12)}
    )
    assert data.loss.shape == (3, 2) and data.step.values.tolist() == [2.0, 9.0]
    assert len(rj.plot(run, half).axes) == 4


def test_iterates_alone_are_compared_as_such():
    with pytest.warns(UserWarning, match="iterates themselves"):
        run = recorded(loss, [(t, PATH[t]) for t in (0, 4, 8)])
    flow = rj.integrate(flow_of(), PARAMS, 12, every=4)
    comparison = rj.compare(run, flow)
    expected = [
        optax.tree.norm(
            optax.tree.sub(jax.tree.map(lambda x, i=i: x[i], flow.params), PATH[t])
        )
        for i, t in enumerate((0, 4, 8))
    ]
    np.testing.assert_allclose(comparison.distance, expected, atol=1e-15)
    assert np.isnan(run.metrics["amplitude"]).all()
    said = rj.dataset(run, {"modulated": flow}).distance.attrs["long_name"]
    assert said == "distance of the centre from the run's iterate"


def test_a_run_that_diverged_says_where():
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    run = recorded(loss, enumerate([*PATH[:6], bad, bad]))
    assert float(run.diverged_at) == 5.0
    assert float(recorded(loss, enumerate(PATH)).diverged_at) == np.inf


def test_bad_records_are_refused():
    pick = lambda *steps: [(t, PATH[t]) for t in steps]
    for records, message in (
        ([], "empty"),
        (pick(1, 2, 2), "must increase, and 2 follows 2"),
        (pick(3, 1), "must increase, and 1 follows 3"),
        (pick(1, 2, 3, 7, 8), "steps 7, 8 are not of three in a row"),
    ):
        with pytest.raises(ValueError, match=message):
            recorded(loss, records)
    flow = rj.integrate(flow_of(), PARAMS, 8, every=2)
    run = recorded(loss, pick(2, 3, 4, 8, 9, 10))
    with pytest.raises(ValueError, match=r"no saved step 3, 9, at which.*0 to 8"):
        rj.compare(run, flow)
