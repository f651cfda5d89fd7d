"""`rodjax sweep`, run in this process as a user would call it."""

import json
from functools import partial

import cli_runner
import jax
import numpy as np
import optax
import pytest
import xarray

import rodjax as rj
from rodjax.cli import _axes as axes
from rodjax.cli import _names as choices
from rodjax.cli import _shared as shared

FAST = ["--problem", "scalar-factorization", "--flows", "edge", "--warmup", "2"]
FAST += ["--steps", "8", "--every", "4"]


invoke = partial(cli_runner.invoke, "sweep")


def result(out):
    with xarray.open_dataset(out / "result.nc", engine="h5netcdf") as data:
        return data.load()


#: Lanes of three learning rates, the largest of which is lost, each four times.
GRID = [
    *FAST, "--problem", "quadratic", "--optimizer", "heavy-ball", "--flows",
    "stable,edge", "--lr", "0.2,0.1,1e60", "--axis", "momentum=0.5:0.9:3",
    "--axis", "floor=1e-3,1e-2", "--zip", "lr,momentum", "--seeds", 2,
    "--time-chunk", 4, "--limit",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def built_once():
    """Problems by name: of the same loss, the same sweep is not compiled again."""
    build, found = shared.problem, {}

    def problem(*asked):
        if str(asked) not in found:
            found[str(asked)] = build(*asked)
        return found[str(asked)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "problem", problem)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A sweep's directory, what the command said, and the result."""
    out = tmp_path_factory.mktemp("sweeps") / "deep" / "sweep"
    said = invoke(*GRID, "--out", out)
    assert said.exit_code == 0, said.output
    return out, said, result(out)


def test_table_and_progress(first):
    out, said, _ = first
    lines = said.stderr.splitlines()
    assert lines[0] == "sweep: compiling" and len(lines) == 3
    assert lines[-1].startswith("sweep: 100% 8 alive, 4 diverged, ")
    rows = [line.split() for line in said.stdout.splitlines()]
    assert rows[1] == ["run", "stable", "edge", "limit"]
    assert [row[0] for row in rows[3:6]] == ["0.1", "0.2", "1e+60"]
    assert rows[5][1:] == ["4", "of", "4", *["-"] * 6]
    assert said.stdout.splitlines()[-2].startswith(f"written to {out}: ")
    assert said.stdout.splitlines()[-1] == f"in a browser: rodjax view {out}/result.nc"


def test_files_and_schema(first):
    out, _, data = first
    for name in ("lr.png", "lanes.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["problem"] == "quadratic" and summary["optimizer"] == "heavy-ball"
    assert summary["steps"] == 8 and summary["warmup"] == 2
    assert summary["grid"]["lr"] == [0.2, 0.1, 1e60] and summary["lanes"] == 12
    assert summary["dimensions"] == {"lr": 3, "floor": 2, "seed": 2}
    assert summary["run"]["diverged"] == 4
    assert list(summary["flows"]) == ["stable", "edge"]
    models = summary["flows"] | {"limit": summary["limit"]}
    for name, model in models.items():
        alive = data.final_distance.sel(flow=name).isel(lr=[0, 1])
        found = model["final_distance"]
        assert found == pytest.approx(float(alive.median()))
    assert data.attrs["warmup"] == 2 and data.attrs["dtype"] == "float64"
    assert data.attrs["rank"] == "each flow's own"
    assert data.step.values.tolist() == [2, 6, 10]


def test_axes_zip_and_seeds_reach_the_data(first):
    _, _, data = first
    assert dict(data.diverged_at.sizes) == {"flow": 4, "lr": 3, "floor": 2, "seed": 2}
    assert data.momentum.dims == ("lr",)
    np.testing.assert_allclose(data.momentum, [0.5, 0.7, 0.9])
    assert data.seed.values.tolist() == [0, 1]

    problem = choices.problem("quadratic", "float64")
    dynamics = rj.dynamics(
        lambda h: optax.sgd(h["lr"], momentum=h["momentum"]), problem.loss
    )
    h = {name: float(data[name][1]) for name in ("lr", "momentum")}
    window = rj.warm_up(dynamics, problem.draw(jax.random.key(1)), 2, lr=h)
    run = rj.descend(dynamics, window, 8, lr=h, every=4)
    lane = data.isel(lr=1, seed=1)
    np.testing.assert_allclose(lane.loss.sel(flow="run")[0], run.metrics["loss"])
    # The floor reaches the flow and leaves the run alone.
    loss = lane.mean_loss.isel(floor=[0, 1])
    assert loss.sel(flow="run").diff("floor").max() == 0
    assert loss.sel(flow="edge").diff("floor").max() > 0


def test_the_same_command_again_goes_on(first):
    out, said, data = first
    again = invoke(*GRID, "--out", out)
    assert again.exit_code == 0, again.output
    assert f"nothing left to do of 120 steps in {out}" in again.stderr
    assert again.stdout == said.stdout
    xarray.testing.assert_identical(result(out), data)


def test_another_command_in_its_place_is_refused(first):
    out, _, data = first
    changed = invoke(*GRID, "--substeps", 2, "--out", out)
    assert changed.exit_code == 2
    assert "substeps was default, is now 2" in changed.stderr
    xarray.testing.assert_identical(result(out), data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", 0.3),
        ("1e-2:1:3log", [0.01, 0.1, 1.0]),
        ("0:1:3", [0.0, 0.5, 1.0]),
        ("1:-1:3lin", [1.0, 0.0, -1.0]),
        ("0.1, 3,2e-1", [0.1, 3.0, 0.2]),
    ],
)
def test_values(text, expected):
    found = axes.values("--lr", text)
    assert np.shape(found) == np.shape(expected)
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize(
    "text", ["", "a", "0.1,", "1:2", "1:2:3:4", "1:2:1", "1:2:3cube", "0:1:3log"]
)
def test_malformed_values(text):
    with pytest.raises(ValueError, match="--lr"):
        axes.values("--lr", text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "0.1:0.5"], "FROM:TO:COUNTlog"),
        (["--lr", "0.1,-1"], "positive"),
        (["--lr", "nan"], "positive"),
        (["--axis", "momentum"], "NAME=VALUES"),
        (["--axis", "b2=0.9,0.99"], "momentum"),
        (["--axis", "lr=0.1"], "use --lr"),
        (["--axis", "momentum=0.1", "--set", "momentum=0.2"], "--set"),
        (["--axis", "momentum=0.1", "--axis", "momentum=0.2"], "twice"),
        (["--axis", "floor=1e-3,-1"], "at least 0"),
        (["--axis", "floor=1e-3", "--flows", "stable"], "modulated, edge"),
        # Their starts are not drawn.
        (["--seeds", "2"], "quadratic"),
        (["--seeds", "2", "--problem", "berthier"], "quadratic"),
        (["--seeds", "0"], "--seeds 0"),
        (["--zip", "lr,momentum"], "--zip lr,momentum"),
        (["--zip", "lr"], "two axes"),
        (["--lr", "1,2", "--axis", "momentum=0:0.9:3", "--zip", "lr,momentum"], "(3,)"),
        (["--lanes", "0"], "lane_chunk"),
        (["--time-chunk", "3"], "time_chunk"),
        (["--steps", "7"], "--every 4"),
        (["--flows", "centre"], "--flows centre"),
        (["--flows", "edge,edge"], "--flows edge,edge: edge is named twice"),
        (["--rank", "2"], "--rank 2: none of the flows takes it; name one of rod"),
        (["--solver", "rk5"], "tsit5"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, arguments, words):
    out = tmp_path / "out"
    found = invoke(*FAST, "--lr", "0.1,0.2", "--out", out, *arguments)
    assert found.exit_code == 2
    assert words in found.stderr
    assert not out.exists()


def test_results_of_another_command_are_kept(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    found = invoke(*FAST, "--out", tmp_path)
    assert found.exit_code == 2
    assert "summary.json" in found.stderr
    assert (tmp_path / "summary.json").read_text() == "{}"
