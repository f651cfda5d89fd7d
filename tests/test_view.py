"""Pages for a browser: what they hold, and what Chromium without a network shows."""

import base64
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray
from browser import CHROMIUM, chromium
from cli_runner import invoke

import rodjax as rj

STEPS = np.arange(5, 15)
FLOWS = ["run", "stable", "modulated"]
PANELS = ("mean_loss", "sharpness_ratio", "distance", "amplitude")
#: Of three models in four panels, less the distance of the run from itself.
TRACES = 11


def made_up(dims, **coordinates):
    """A result whose numbers are all different; `dims` are its grid's lengths."""
    shape = (len(FLOWS), *dims.values(), len(STEPS))
    names = ("flow", *dims, "step")
    values = 0.1 + 1e-3 * np.arange(np.prod(shape)).reshape(shape)
    columns = {key: (names, (1 + row) * values) for row, key in enumerate(PANELS)}
    columns["diverged_at"] = (names[:-1], np.full(shape[:-1], np.nan))
    return xarray.Dataset(columns, {"flow": FLOWS, "step": STEPS, **coordinates})


@pytest.fixture
def grid():
    """Four learning rates, not in order, and three seeds; the largest rate is lost."""
    data = made_up({"lr": 4, "seed": 3}, lr=[0.8, 0.1, 0.4, 0.2], seed=[0, 1, 2])
    data.diverged_at.loc[{"flow": "run", "lr": 0.8}] = 9.0
    data.diverged_at.loc[{"flow": "stable", "lr": 0.8, "seed": 2}] = 12.0
    data.mean_loss.loc[{"flow": "run", "lr": 0.8, "step": slice(9, None)}] = np.inf
    return data


def numbers(found):
    """A list of numbers as plotly writes it."""
    if isinstance(found, list):
        return np.array(found, float)
    return np.frombuffer(base64.b64decode(found["bdata"]), f"<{found['dtype']}")


def called(page, function):
    """What a function of plotly is given in a page: the JSON after the name."""
    rest, found = page.rpartition(f"{function}(")[2], []
    rest = rest.partition(",")[2]
    while rest:
        one, end = json.JSONDecoder().raw_decode(rest.lstrip())
        found.append(one)
        mark, _, rest = rest.lstrip()[end:].lstrip().partition(" ")
        if not mark.startswith(","):
            return found
    raise AssertionError(function)


def test_every_lane_is_in_the_page(grid):
    page = rj.view(grid, "<a> & b")
    assert "<title>&lt;a&gt; &amp; b</title>" in page
    traces, layout, config = called(page, "Plotly.newPlot")
    assert len(traces) == TRACES and not config["showSendToCloud"]
    assert [s["currentvalue"]["prefix"] for s in layout["sliders"]] == ["lr ", "seed "]
    labels = [[step["label"] for step in s["steps"]] for s in layout["sliders"]]
    assert labels == [["0.1", "0.2", "0.4", "0.8"], ["0", "1", "2"]]
    (frames,) = called(page, "Plotly.addFrames")
    assert len(frames) == 12
    frame = {frame["name"]: frame for frame in frames}["3,2"]
    lane = grid.sel(lr=0.8, seed=2)
    for row, trace in zip(frame["data"], traces, strict=True):
        key = PANELS[int(trace["yaxis"][1:] or 1) - 1]
        expected = lane[key].sel(flow=trace["name"]).values
        expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_array_equal(numbers(row["y"]), expected)
        np.testing.assert_array_equal(numbers(trace["x"]), STEPS)
    (said,), (shade, edge) = (frame["layout"][k] for k in ("annotations", "shapes"))
    assert said["text"] == "run diverged at step 9<br>stable diverged at step 12"
    assert shade["visible"] and (shade["x0"], shade["x1"]) == (9, 14)
    assert (edge["yref"], edge["y0"], edge["y1"]) == ("y2", 1, 1)
    # Scales are of the lanes that were not lost, in powers of ten.
    alive = grid.mean_loss.sel(lr=[0.1, 0.2, 0.4])
    low, high = layout["yaxis"]["range"]
    assert 10**low < alive.min() and alive.max() < 10**high < 2 * alive.max()
    kinds = [layout[f"yaxis{n}"]["type"] for n in ("", "2", "3", "4")]
    assert kinds == ["log", "linear", "log", "log"]


def test_axes_that_vary_together_share_a_slider():
    data = made_up({"lr": 2}, lr=[0.1, 0.2], momentum=("lr", [0.5, 0.9]))
    _, layout, _ = called(rj.view(data), "Plotly.newPlot")
    (slider,) = layout["sliders"]
    labels = [step["label"] for step in slider["steps"]]
    assert labels == ["0.1, momentum 0.5", "0.2, momentum 0.9"]


def test_panels_are_of_what_was_recorded():
    data = made_up({}).drop_vars(["sharpness_ratio", "distance"])
    data.amplitude.loc[{"flow": "stable"}] = 0.0
    traces, layout, _ = called(rj.view(data), "Plotly.newPlot")
    titles = [layout[axis]["title"]["text"] for axis in ("yaxis", "yaxis2")]
    assert titles == ["time-averaged loss", "oscillation amplitude"]
    assert len(traces) == 6 and "yaxis3" not in layout and "sliders" not in layout
    # A logarithmic axis has no place for 0.
    assert np.isnan(numbers(traces[4]["y"])).all()


def test_all_that_is_lost_is_still_a_page(grid):
    grid["diverged_at"] = grid.diverged_at.fillna(5.0)
    for key in PANELS:
        grid[key] *= np.nan
    _, layout, _ = called(rj.view(grid), "Plotly.newPlot")
    assert np.isfinite(layout["yaxis"]["range"]).all()


def test_a_large_grid_is_shown_at_fewer_values(monkeypatch):
    monkeypatch.setattr("rodjax.report._view.MOST", 3000)
    rates = np.geomspace(1e-3, 1, 40)
    page = rj.view(made_up({"lr": 40, "seed": 2}, lr=rates, seed=[0, 1]))
    (lr, seed) = called(page, "Plotly.newPlot")[1]["sliders"]
    labels = [step["label"] for step in lr["steps"]]
    # 2 x 40 lanes of 3 models in 4 panels at 10 steps are 9600 numbers.
    assert len(labels) == 10 and (labels[0], labels[-1]) == ("0.001", "1")
    assert len(seed["steps"]) == 2


@pytest.mark.parametrize("columns", [{}, {"loss": ("step", [1.0])}])
def test_other_data_is_refused(columns):
    with pytest.raises(ValueError, match="neither mean_loss and diverged_at"):
        rj.view(xarray.Dataset(columns))


# --- the command ---------------------------------------------------------------------


def test_bad_input_ends_in_a_line(tmp_path):
    made_up({}).drop_vars("diverged_at").to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    (tmp_path / "no.nc").write_text("text")
    for arguments, words in (
        (["absent.nc"], "there is no file"),
        (["."], "is a directory: give"),
        (["no.nc"], "no.nc is no netCDF file"),
        (["x.nc"], "data has neither mean_loss and diverged_at"),
        (["x.nc", f"--out={tmp_path}"], "give the name of a new HTML file"),
        (["x.nc", f"--out={tmp_path / 'x.nc'}"], "give the name of a new HTML file"),
    ):
        found = invoke("view", tmp_path / arguments[0], *arguments[1:])
        assert found.exit_code == 2, found.output
        line = found.output.strip().splitlines()[-1]
        assert line.startswith("rodjax view: ") and words in line


# --- in a browser --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab():
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with chromium() as tab:
        yield tab


def opened(tab, file, data):
    """The page of the data in a tab that has said nothing before."""
    file.write_text(rj.view(data, "a title"), encoding="utf-8")
    tab.console.clear()
    tab.requests.clear()
    tab.open(file.as_uri())
    tab.until("document.querySelectorAll('.scatterlayer .trace path').length > 0")
    # All that the page asks for is itself, and pictures that it holds.
    asked = [url for url in tab.requests if not url.startswith("data:")]
    assert asked == [file.as_uri()]


def test_a_run_opens_without_a_network(tab, tmp_path):
    sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    edge = [rj.edge_of_stability(sgd)]
    run = rj.descend(sgd, jnp.ones(2), 6, metrics=edge)
    flow = rj.integrate(rj.flows.stable(sgd), jnp.ones(2), 6, metrics=edge)
    data = rj.dataset(run, {"stable": flow})
    opened(tab, tmp_path / "run.html", data)
    assert tab.run("document.querySelectorAll('.scatterlayer .trace').length") == 7
    assert tab.run("document.getElementById('view').data.length") == 7
    loss = tab.run("Array.from(document.getElementById('view')._fullData[0].y)")
    np.testing.assert_allclose(loss, data.mean_loss.sel(flow="run"))
    # One zoom is for all panels, and labels of all panels go with the pointer.
    tab.run("Plotly.relayout('view', {'xaxis.range': [2, 4]}).then(() => 0)")
    axes = "document.getElementById('view')._fullData.map(trace => trace.xaxis)"
    assert tab.run(axes) == ["x"] * 7
    place = tab.run(
        "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        "(document.querySelector('.nsewdrag').getBoundingClientRect())"
    )
    for shift in range(3):
        where = {"x": place[0] + shift, "y": place[1]}
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", **where)
    tab.until("document.querySelectorAll('.hovertext .nums').length > 2")
    assert tab.console == []


def test_sliders_choose_the_lane(tab, tmp_path, grid):
    opened(tab, tmp_path / "sweep.html", grid)
    assert tab.run("document.querySelectorAll('.scatterlayer .trace').length") == TRACES
    for index, name in ((0, "lr"), (1, "seed")):
        x, y = tab.run(
            f"(r => [r.right - 3, r.y + r.height / 2])(document.querySelectorAll("
            f"'.slider-rail-touch-rect')[{index}].getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            more = {"button": "left", "clickCount": 1}
            tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        last = len(grid[name]) - 1
        tab.until(
            f"document.getElementById('view').layout.sliders[{index}].active == {last}"
        )
    expected = grid.amplitude.sel(lr=0.8, seed=2, flow="modulated").values
    tab.until(
        f"document.getElementById('view')._fullData[{TRACES - 1}].y[0] == {expected[0]}"
    )
    said = tab.run("document.querySelector('.annotation-text').textContent")
    assert "run diverged at step 9" in said
    assert tab.run("document.getElementById('view').layout.shapes[0].visible")
    assert tab.console == []


def test_checkpoints_open_too(tab, tmp_path):
    columns = {
        "loss": ("step", [2.0, 1.0, 0.5]),
        "status": ("step", [0, 1, 1]),
        "sharpness_ratio": ("step", [0.5, 1.0, np.nan]),
    }
    names = {"status_names": ["below", "at the edge"]}
    data = xarray.Dataset(columns, {"step": [100, 200, 300]}, names)
    opened(tab, tmp_path / "checkpoints.html", data)
    # In each panel a line, and points of each status.
    assert tab.run("document.getElementById('view').data.length") == 6
    legend = "[...document.querySelectorAll('.legendtext')].map(e => e.textContent)"
    assert tab.run(legend) == ["below", "at the edge"]
    assert tab.console == []
