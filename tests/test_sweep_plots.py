"""Pictures of sweeps, from made-up results."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray

import rodjax as rj

STEPS = np.arange(5, 15)


def made_up(dims, **coordinates):
    """A result whose values grow along every axis; `dims` are its grid's lengths."""
    flows = ["run", "stable", "modulated"]
    shape = (len(flows), *dims.values())
    base = 1e-3 * (1 + np.arange(np.prod(shape)).reshape(shape))
    over_time = base[..., None] * np.ones(len(STEPS))
    names = ("flow", *dims)
    return xarray.Dataset(
        {
            "final_distance": (names, base),
            "median_sharpness_ratio": (names, base),
            "diverged_at": (names, np.full(shape, np.nan)),
            "distance": ((*names, "step"), over_time),
            "sharpness_ratio": ((*names, "step"), over_time),
        },
        coords={"flow": flows, "step": STEPS, **coordinates},
    )


@pytest.fixture
def data():
    return made_up(
        {"lr": 4, "seed": 3}, lr=[0.1, 0.2, 0.4, 0.8], seed=np.arange(3)
    ).copy(deep=True)


def drawn(figure, tmp_path):
    """What the panels' lines show; the figure must also render."""
    figure.savefig(tmp_path / "figure.png")
    return [{x.get_label(): x for x in axes.get_lines()} for axes in figure.axes]


def test_medians_and_bands_over_the_other_axes(data, tmp_path):
    figure = rj.plot_sweep(data, title="a title")
    distance, ratio = drawn(figure, tmp_path)
    expected = data.final_distance.sel(flow="stable")
    line = distance["stable"]
    np.testing.assert_array_equal(line.get_xdata(), data.lr)
    np.testing.assert_allclose(line.get_ydata(), expected.isel(seed=1))
    np.testing.assert_allclose(
        ratio["run"].get_ydata(),
        data.median_sharpness_ratio.sel(flow="run").isel(seed=1),
    )
    assert "run" not in distance
    assert figure.axes[1].get_xscale() == figure.axes[0].get_yscale() == "log"
    band = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData)
    assert band.y0 == pytest.approx(expected.min())
    assert band.y1 == pytest.approx(expected.max())


def test_lost_lanes_are_left_out_shaded_and_marked(data, tmp_path):
    data.diverged_at.loc[{"flow": "run", "lr": 0.8}] = 9.0
    data.diverged_at.loc[{"flow": "run", "lr": 0.4, "seed": 2}] = 9.0
    data.diverged_at.loc[{"flow": "stable", "lr": 0.2, "seed": 0}] = 7.0
    figure = rj.plot_sweep(data)
    distance, _ = drawn(figure, tmp_path)
    own = data.final_distance.sel(flow="stable").values
    expected = [own[0, 1], own[1, 1:].mean(), own[2, :2].mean(), np.nan]
    np.testing.assert_allclose(distance["stable"].get_ydata(), expected)
    some, all_of_them = figure.axes[0].patches
    assert some.get_alpha() < all_of_them.get_alpha()
    crosses = [x for x in figure.axes[0].get_lines() if x.get_marker() == "x"]
    assert [x.get_xdata().tolist() for x in crosses] == [[0.2]]
    drawn(rj.plot_lanes(data), tmp_path)


def test_everything_lost_is_still_a_picture(data, tmp_path):
    data.diverged_at[:] = 1.0
    data.sharpness_ratio[:] = np.nan
    drawn(rj.plot_sweep(data), tmp_path)
    drawn(rj.plot_lanes(data), tmp_path)


@pytest.mark.parametrize("scalar", [True, False])
def test_a_single_learning_rate(scalar, tmp_path):
    dims = {} if scalar else {"lr": 1}
    data = made_up(dims, lr=0.3 if scalar else [0.3])
    distance, _ = drawn(rj.plot_sweep(data), tmp_path)
    assert distance["stable"].get_xdata().tolist() == [0.3]
    figure = rj.plot_lanes(data)
    drawn(figure, tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["lr 0.3"]


@pytest.mark.slow
def test_lanes_are_picked_evenly(tmp_path):
    rates = np.geomspace(0.01, 1, 40)
    figure = rj.plot_lanes(made_up({"lr": 40}, lr=rates[::-1]))
    panels = drawn(figure, tmp_path)
    assert len(panels) == 16
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "lr 0.01" and titles[-1] == "lr 1"
    assert set(panels[0]) >= {"run", "stable", "modulated"}
    # In the order of the learning rates, whatever that of the data.
    assert panels[0]["run"].get_ydata()[0] > panels[-1]["run"].get_ydata()[0]


def test_other_axes_and_missing_metrics(tmp_path):
    values = [0.9, 0.5]
    data = made_up(
        {"momentum": 2}, momentum=values, b2=("momentum", [0.1, 0.2]), lr=0.1
    )
    data = data.drop_vars(["sharpness_ratio", "median_sharpness_ratio"])
    distance, ratio = drawn(rj.plot_sweep(data), tmp_path)
    assert distance["stable"].get_xdata().tolist() == [0.5, 0.9]
    assert np.isnan(ratio["stable"].get_ydata()).all()
    zipped, _ = drawn(rj.plot_sweep(data, along="b2"), tmp_path)
    assert zipped["stable"].get_xdata().tolist() == [0.1, 0.2]
    drawn(rj.plot_lanes(data), tmp_path)


def test_a_picture_of_a_run_says_when_it_diverged():
    bowl = rj.dynamics(optax.sgd(3.0), lambda w: 0.5 * jnp.sum(w**2))
    run = rj.descend(bowl, jnp.ones(1), 20)
    path = rj.integrate(rj.flows.stable(bowl), jnp.ones(1), 20)
    (text,) = rj.plot(run, {"stable": path}).axes[0].texts
    assert text.get_text() == "run diverged at step 13"
