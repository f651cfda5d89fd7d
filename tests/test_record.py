"""What is recorded along a trajectory: names, long names, and progress."""

import builtins
import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import lane

import rodjax as rj
from rodjax.report import plot_run

W = jnp.array([1.0, -0.5])
SGD = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * w**2))
size = {"size": jnp.max}


def constant(name, long_names=()):
    """A metric that records one number."""
    return rj.Metric(
        lambda snapshot, *, lr: (),
        lambda snapshot, carry, *, lr: ({name: jnp.ones(())}, carry),
        dict(long_names),
    )


def look(*metrics, flow=None):
    """Two steps, traced only."""
    run = lambda w: (
        rj.descend(SGD, w, 2, lr=0.1, metrics=metrics)
        if flow is None
        else rj.integrate(flow, w, 2, lr=0.1, metrics=metrics)
    )
    return jax.eval_shape(run, W)


# --- names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metrics, name, owners",
    [
        (
            [rj.edge_of_stability(SGD), rj.spectrum(SGD, 2)],
            "residual",
            ["edge_of_stability (number 1)", "spectrum (number 2)"],
        ),
        (
            [rj.monitor(size), rj.edge_of_stability(SGD), rj.monitor(size)],
            "size",
            ["monitor (number 1)", "monitor (number 3)"],
        ),
        (
            [rj.spectrum(SGD, 1), rj.monitor({"ratio_1": jnp.max})],
            "ratio_1",
            ["spectrum (number 1)", "monitor (number 2)"],
        ),
        ([constant("loss")], "loss", ["every trajectory", "constant (number 1)"]),
    ],
    ids=["residual", "monitor twice", "ratio_1", "loss"],
)
def test_two_metrics_of_one_name_are_refused(metrics, name, owners):
    message = f"{name!r} is recorded by {owners[0]} and by {owners[1]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        look(*metrics)


def test_a_flow_and_a_metric_of_one_name_are_refused():
    message = (
        "'predicted_loss' is recorded by the flow itself and by constant (number 1)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        look(constant("predicted_loss"), flow=rj.flows.central(SGD, rank=1))


def test_a_name_of_what_is_recorded_anyway_is_refused_at_once():
    with pytest.raises(ValueError, match="functions has 'mean_loss'"):
        rj.monitor({"mean_loss": jnp.max})


def test_metrics_of_different_names_are_welcome():
    path = look(rj.edge_of_stability(SGD), rj.monitor(size), constant("other"))
    named = {"sharpness_ratio", "residual", "size", "other"}
    assert set(path.metrics) == named | {"loss", "mean_loss", "amplitude"}


# --- long names ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    """A data set of a run and of a flow with a report and a metric of their own."""
    metrics = [constant("height", {"height": "how high it stands"}), constant("plain")]
    options = {"lr": 0.1, "metrics": metrics}
    run = rj.descend(SGD, W, 2, **options)
    # As central's, which takes longer to compile.
    flow = dataclasses.replace(
        rj.flows.stable(SGD),
        observe=lambda y, *, lr: (y.params[None], {"predicted_loss": jnp.ones(())}),
        reports=rj.flows.REGISTRY["central"].reports,
    )
    path = rj.integrate(flow, W, 2, substeps=1, **options)
    return run, path


def test_long_names_arrive_in_the_data_set(labelled):
    run, path = labelled
    data = rj.dataset(run, {"mine": path}, lr=0.1)
    names = {name: variable.attrs["long_name"] for name, variable in data.items()}
    assert names == {
        "loss": "loss at the centre",
        "mean_loss": "loss averaged over the ends of the oscillation",
        "amplitude": "size of the oscillation of the parameters",
        "distance": "distance of the centre from the run's midpoint",
        "predicted_loss": "time-averaged loss that the central flow predicts",
        "height": "how high it stands",
        "plain": "plain",
        "diverged_at": "step by which it had diverged",
    }
    assert np.isnan(data.predicted_loss.sel(flow="run")).all()
    np.testing.assert_array_equal(data.predicted_loss.sel(flow="mine"), 1.0)


def test_the_limit_is_one_more_entry_of_the_data_set(labelled):
    run, path = labelled
    limit = rj.predictability(SGD, W, 2, lr=0.1)
    data = rj.dataset(run, {"mine": path}, predictability=limit, lr=0.1)
    assert data.flow.values.tolist() == ["run", "mine", "limit"]
    np.testing.assert_array_equal(data.distance.sel(flow="limit"), limit.distance)
    assert np.isnan(data.loss.sel(flow="limit")).all() and data.attrs == {"lr": 0.1}
    figures = rj.plot(run, {"mine": path}, predictability=limit), plot_run(data)
    drawn = [
        [
            np.asarray(line.get_ydata())
            for axes in figure.axes
            for line in axes.get_lines()
        ]
        for figure in figures
    ]
    np.testing.assert_array_equal(*map(np.concatenate, drawn))


def test_long_names_survive_vmap_and_a_change_of_what_is_kept(labelled):
    run, _ = labelled
    runs = jax.vmap(lambda lr: rj.descend(SGD, W, 2, lr=lr, metrics=[constant("a")]))(
        jnp.array([0.1, 0.2])
    )
    assert dict(runs.long_names)["loss"] == "loss at the centre"
    assert lane(runs, 0).long_names == runs.long_names
    assert dataclasses.replace(run, params=None).long_names == run.long_names


def test_a_missing_xarray_names_the_extra(labelled, monkeypatch):
    run, path = labelled
    load = builtins.__import__

    def without(name, *rest, **options):
        if name == "xarray":
            raise ModuleNotFoundError("No module named 'xarray'")
        return load(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'rodjax\[sweep\]'"):
        rj.dataset(run, {"mine": path})


def test_a_data_set_is_of_one_lane():
    runs = jax.vmap(lambda lr: rj.descend(SGD, W, 2, lr=lr))(jnp.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"several lanes, steps of shape \(2, 3\)"):
        rj.dataset(runs, {})
    assert rj.dataset(lane(runs, 1), {})["loss"].shape == (1, 3)


NAMES = ["distance", "flow", "step", "diverged_at", "evaluations", "final_loss", "a/b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_a_labelled_result_cannot_have_is_refused(name):
    """Before anything is run."""
    with pytest.raises(ValueError, match=f"metrics: '{name}', recorded by .* another"):
        rj.descend(SGD, W, 2, lr=0.1, metrics=[constant(name)])


# --- progress ------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [1, 99, 100, 250])
def test_progress_is_told_a_hundred_times_at_most(moments):
    told = []
    progress = lambda step, loss: told.append((int(step), float(loss)))
    run = rj.descend(SGD, W, 2 * moments, lr=0.1, every=2, progress=progress)
    jax.block_until_ready(run)
    jax.effects_barrier()
    steps = sorted(step for step, _ in told)
    assert len(steps) == len(set(steps)) and min(50, moments) <= len(steps) <= 100
    assert steps[-1] == 2 * moments
    assert len(set(np.diff(steps))) <= 1
    for step, loss in told:
        assert loss == float(run.metrics["loss"][step // 2])


def test_nothing_calls_the_host_where_no_progress_is_asked_for():
    def calls(solve, progress):
        text = jax.jit(lambda lr: solve(lr=lr, progress=progress)).lower(0.1).as_text()
        # Diffrax has others, which raise its errors, in branches of their own.
        of = lambda line: "callback" in line and "has_side_effect" in line
        return sum(map(of, text.splitlines()))

    flow = rj.flows.stable(SGD)
    for solve in (
        partial(rj.descend, SGD, W, 2),
        partial(rj.integrate, flow, W, 2, substeps=1),
    ):
        assert calls(solve, lambda step, loss: None) == 1
        assert calls(solve, None) == 0
