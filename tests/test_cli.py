"""The command line, run in this process as a user would call it."""

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import cli_runner
import numpy as np
import optax
import pytest
import xarray

from rodjax.cli import _names as choices
from rodjax.cli._run import OF_LIMIT, run
from rodjax.cli._sweep import sweep

FAST = ["--problem", "scalar-factorization", "--lr", "0.2", "--warmup", "3"]
FLOWS = ["--flows", "stable,central:1", "--solver", "Midpoint"]
LONG = [*FAST, "--steps", 8, "--every", 2, *FLOWS]
FLOW_KEYS = {
    "final_distance",
    "mean_distance",
    "final_loss",
    "final_sharpness_ratio",
    "median_sharpness_ratio",
    "update_evaluations",
    "diverged_at",
}


invoke = partial(cli_runner.invoke, "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory and what the command said."""
    out = tmp_path_factory.mktemp("runs") / "deep" / "run"
    result = invoke(*LONG, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result


def test_table_and_progress(finished):
    out, result = finished
    assert "final distance" in result.stdout and f"written to {out}" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["limit", "stable", "central:1"] in rows
    said = result.stderr.splitlines()
    # Five saved moments, of which the first is the warm-up's end.
    assert said[0] == "gd: compiling" and len(said) == 5
    assert said[-1].startswith("gd: 100% 1 alive, 0 diverged, ")


def test_it_says_how_to_view_the_result(finished):
    out, result = finished
    line = result.stdout.splitlines()[-1]
    rodjax, *arguments = shlex.split(line.removeprefix("in a browser: "))
    assert rodjax == "rodjax"
    viewed = cli_runner.invoke(*arguments)
    assert viewed.exit_code == 0, viewed.output
    page = (out / "result.html").read_text(encoding="utf-8")
    assert "<title>scalar-factorization, gd, lr 0.2, float64</title>" in page
    assert str(out / "result.html") in viewed.stdout


def test_files_and_schema(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        *("problem", "optimizer", "lr", "steps", "warmup", "dtype", "threshold"),
        *("run", "limit", "flows"),
    }
    assert summary["threshold"] == pytest.approx(10.0)
    assert set(summary["run"]) == {"final_loss", "diverged_at"}
    assert list(summary["flows"]) == ["stable", "central:1"]
    for row in summary["flows"].values():
        assert set(row) == FLOW_KEYS
        assert row["diverged_at"] is None
        assert all(isinstance(row[key], float) for key in FLOW_KEYS - {"diverged_at"})
    # The run and three others, nudged: to rounding, in so few steps.
    assert summary["limit"]["update_evaluations"] == 4 * 8
    assert 0 < summary["limit"]["final_distance"] < 1e-14
    assert set(summary["limit"]) == {*OF_LIMIT, "diverged_at"}
    # Two stages with 4 substeps, 8 steps.
    assert summary["flows"]["central:1"]["update_evaluations"] == 8 * 4 * 2
    with xarray.open_dataset(out / "result.nc", engine="h5netcdf") as data:
        assert list(data.step.values) == [3, 5, 7, 9, 11]
        final = data.distance.sel(flow="central:1").values[-1]
        assert summary["flows"]["central:1"]["final_distance"] == final
        assert data.attrs["every"] == 2 and data.attrs["solver"] == "Midpoint"
        assert data.attrs["rank"] == "each flow's own"
        assert data.loss.dtype == np.float64
        assert data.flow.values.tolist() == ["run", "stable", "central:1", "limit"]
        limit = data.distance.sel(flow="limit").values
        assert limit[-1] == summary["limit"]["final_distance"]
        # Of what other flows do not report.
        assert np.isfinite(data.predicted_loss.sel(flow="central:1").values).all()
        assert np.isnan(data.predicted_loss.sel(flow="stable").values).all()
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_overwritten_only_when_told(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    arguments = [*FAST, "--steps", 2, "--flows", "", "--out", out]
    before = (out / "summary.json").read_text()
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    for words in ("steps was 8, is now 2", "flows was [", "--overwrite"):
        assert words in refused.stderr
    assert (out / "summary.json").read_text() == before
    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert json.loads((out / "summary.json").read_text())["flows"] == {}


def test_files_that_say_not_what_they_are_of_are_not_touched(finished, tmp_path):
    shutil.copy(finished[0] / "plot.png", tmp_path)
    refused = invoke(*FAST, "--out", tmp_path)
    assert refused.exit_code == 2
    assert "already holds plot.png" in refused.stderr


def same_results(out, other):
    """Bit by bit; some versions of HDF5 write the time into the file besides."""
    one, two = (xarray.load_dataset(path / "result.nc") for path in (out, other))
    xarray.testing.assert_identical(one, two)
    assert (out / "summary.json").read_bytes() == (other / "summary.json").read_bytes()


def test_a_finished_run_is_told_again(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    for name in ("summary.json", "result.nc", "plot.png"):
        (out / name).unlink()
    again = invoke(*LONG, "--out", out)
    assert again.exit_code == 0, again.output
    assert f"nothing left to do of 11 steps in {out}" in again.stderr
    same_results(out, finished[0])


@pytest.mark.parametrize(
    "kills", [1, pytest.param(4, marks=[pytest.mark.slow])], ids=["once", "often"]
)
def test_a_killed_run_ends_with_the_same_bits(finished, tmp_path, kills):
    """By SIGKILL, at any moment after the first chunk is stored."""
    words = [sys.executable, "-m", "rodjax.cli", "run", *map(str, LONG), "--steps=400"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    start = partial(subprocess.Popen, env=environment, stderr=subprocess.DEVNULL)

    def stored(out):
        rows = out / "checkpoints" / "rows"
        return len([p for p in rows.glob("*") if p.name.isdigit()])

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start([*words, f"--out={whole}"]).wait(300) == 0
    for kill in range(kills):
        process, before = start([*words, f"--out={out}"]), stored(out)
        try:
            while process.poll() is None and stored(out) < before + 1 + kill % 3:
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    assert 0 < stored(out) < 20
    assert start([*words, f"--out={out}"]).wait(300) == 0
    same_results(out, whole)


@pytest.mark.slow
def test_a_network_hyperparameters_float32_and_optax_names(tmp_path):
    result = invoke(
        "--problem", "clusters-mlp", "--problem-set", "widths=(3,)", "--lr", "0.2",
        "--optimizer", "sgd", "--set", "momentum=0.8", "--set", "nesterov=false",
        "--warmup", 0, "--steps", 2, "--flows", "", "--float32", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dtype"] == "float32" and summary["optimizer"] == "sgd"
    # (2 / lr) (1 + momentum)
    assert summary["threshold"] == pytest.approx(18.0, rel=1e-6)
    check_accuracy(result, tmp_path, reported=True)


def check_accuracy(result, out, reported):
    """Networks report their accuracy, other problems none."""
    summary = json.loads((out / "summary.json").read_text())
    for row in (summary["run"], *summary["flows"].values()):
        assert ("final_accuracy" in row) == reported
        assert 0 <= row.get("final_accuracy", 0) <= 1
    assert ("accuracy" in result.stdout) == reported


def test_divergence_is_reported(tmp_path):
    result = invoke(
        "--problem", "scalar-factorization", "--lr", 5.0, "--warmup", 0, "--steps", 40,
        "--flows", "stable", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["run"]["diverged_at"] < 20
    lost = summary["flows"]["stable"]["diverged_at"]
    assert f"stable diverged at step {lost:g}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problem", "mnist"], "digits-mlp"),
        (["--optimizer", "adamm"], "scalar-adam"),
        (["--optimizer", "lookahead"], "learning_rate"),
        (["--set", "b2=0.9"], "momentum"),
        (["--set", "momentum"], "NAME=VALUE"),
        (["--flows", "stable,centre"], "--flows centre: choose from stable, rod"),
        (["--flows", "centre:2"], "--flows centre:2: choose from stable, rod"),
        (["--flows", "rod,stable,rod"], "--flows rod,stable,rod: rod is named twice"),
        (["--flows", "central:0"], "rank must be at least 1"),
        (["--flows", "rod:"], "--flows rod:: write NAME:RANK for one of rod, central"),
        (["--flows", "rod:two"], "--flows rod:two: write NAME:RANK"),
        (["--flows", "rod:-1"], "--flows rod:-1: write NAME:RANK"),
        (["--flows", "stable:2"], "--flows stable:2: write NAME:RANK"),
        (["--flows", "central", "--optimizer", "adam"], "rodjax.flows.stable"),
        (["--flows", "principal", "--optimizer", "rmsprop"], "rodjax.flows.stable"),
        (["--problem-set", "widths=3"], "scalar-factorization takes initial, target"),
        (["--problem-set", "initial"], "--problem-set initial: write NAME=VALUE"),
        (["--problem", "digits-cnn", "--problem-set", "n=0"], "n=0"),
        (["--problem", "cifar10-cnn"], "--problem-set path=..."),
        (["--problem", "cifar10-mlp", "--problem-set", "path=nowhere"], "nowhere"),
        (["--solver", "rk5"], "tsit5"),
        (["--solver", "kvaerno3"], "name an explicit diffrax solver"),
        (["--set", "momentum=abc"], "'abc' is no number"),
        (["--set", "momentum=0.9,nesterov=True"], "is no number"),
        (["--problem", "digits-mlp", "--problem-set", "widths=8"], "widths=8"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "7", "--every", "2"], "--every 2"),
        (["--warmup", "-1"], "--warmup"),
        (["--substeps", "0"], "--substeps"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--rank", "2", "--flows", "stable,rod:3"], "--rank 2: none of the flows"),
        (["--optimizer", "heavy-ball", "--flows", "rod", "--rank", "3"], "modulated"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, arguments, words):
    out = tmp_path / "out"
    result = invoke(*FAST, "--out", out, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not out.exists()


def test_a_directory_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        result = invoke(*FAST, "--out", out)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1


def test_an_optimizer_without_a_threshold_runs_and_is_written(tmp_path):
    """An infinite threshold is no attribute of netCDF."""
    arguments = "--flows", "stable", "--optimizer", "lion", "--out", tmp_path
    result = invoke(*FAST, *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "summary.json").read_text())["threshold"] is None
    with xarray.open_dataset(tmp_path / "result.nc", engine="h5netcdf") as data:
        assert np.isfinite(data.loss.drop_sel(flow="limit").values).all()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    result = invoke(*FAST, "--flows", "stable", "--out", tmp_path)
    assert result.exit_code == 1
    assert "no room left for" in result.stderr
    assert not list(tmp_path.glob("*.nc*"))


@pytest.mark.slow
def test_other_periods_and_unheld_edges_are_told(tmp_path, monkeypatch):
    """Two filters in a row ring with a period of six; on a quadratic no X holds."""
    twice = lambda learning_rate: optax.chain(
        optax.trace(0.5), optax.trace(0.5), optax.sgd(learning_rate)
    )
    choice = choices.OPTIMIZERS["nadam"]._replace(build=twice)
    monkeypatch.setitem(choices.OPTIMIZERS, "nadam", choice)
    arguments = "--optimizer", "nadam", "--flows", "stable", "--out", tmp_path
    result = invoke(*FAST, *arguments)
    assert "to an oscillation of period 6" in result.stdout
    arguments = "--flows", "central", "--out", tmp_path, "--overwrite"
    bowl = "--problem", "quadratic", "--lr", 3.0, "--warmup", 0, "--steps", 4
    result = invoke(*bowl, *arguments)
    assert "central is not to be trusted" in result.stdout


@pytest.mark.slow
def test_all_flows_run_and_report(tmp_path):
    names = [*choices.FLOWS, "rod:2"]
    result = invoke(
        "--problem", "berthier", "--lr", 0.3, "--warmup", 3, "--steps", 4, "--every", 2,
        "--flows", ",".join(names), "--substeps", 1, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    flows = json.loads((tmp_path / "summary.json").read_text())["flows"]
    assert list(flows) == names
    assert all(row["diverged_at"] is None for row in flows.values())
    with xarray.open_dataset(tmp_path / "result.nc", engine="h5netcdf") as data:
        assert np.isfinite(data.loss.drop_sel(flow="limit").values).all()


def test_default_flows_exist():
    for command in (run, sweep):
        default = inspect.signature(command).parameters["flows"].default
        assert set(default.split(",")) <= choices.FLOWS.keys()


TOYS = (
    *("quadratic", "quartic-well", "factorization", "banana", "cosine"),
    *("berthier", "berthier-circle", "berthier-matrix"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, []) for name in TOYS] + [("digits-cnn", ["n=10", "channels=(2,)"])],
)
def test_problems_run(tmp_path, name, settings):
    given = [word for setting in settings for word in ("--problem-set", setting)]
    result = invoke(
        "--problem", name, "--lr", 0.1, "--warmup", 0, "--steps", 2,
        "--flows", "stable", "--out", tmp_path, *given,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    check_accuracy(result, tmp_path, reported=bool(settings))
