"""The command line, run in this process as a user would call it."""

import json

import numpy as np
import pytest
import xarray
from typer.testing import CliRunner

from rodjax.cli import _names as choices
from rodjax.cli import app

FAST = ["--problem", "scalar-factorization", "--lr", "0.2", "--start", "3"]
FLOW_KEYS = {
    "final_distance",
    "mean_distance",
    "final_loss",
    "final_sharpness_ratio",
    "median_sharpness_ratio",
    "update_evaluations",
    "seconds",
    "diverged_at",
}


pytestmark = pytest.mark.usefixtures("own_configuration")


def invoke(*arguments):
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def test_files_table_and_schema(tmp_path):
    out = tmp_path / "deep" / "run"
    result = invoke(*FAST, "--steps", 8, "--every", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "modulated" in result.stdout and "final distance" in result.stdout
    assert "8/8 steps" in result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        *("problem", "optimizer", "lr", "steps", "start", "dtype", "threshold"),
        *("run", "flows"),
    }
    assert summary["threshold"] == pytest.approx(10.0)
    assert set(summary["run"]) == {"final_loss", "diverged_at"}
    assert list(summary["flows"]) == ["stable", "rod", "modulated"]
    for row in summary["flows"].values():
        assert set(row) == FLOW_KEYS
        assert row["diverged_at"] is None
        assert all(isinstance(row[key], float) for key in FLOW_KEYS - {"diverged_at"})
    # Heun with 4 substeps, 8 steps, 4 evaluations a call.
    assert summary["flows"]["modulated"]["update_evaluations"] == 8 * 4 * 2 * 4
    with xarray.open_dataset(out / "result.nc", engine="h5netcdf") as data:
        assert list(data.step.values) == [3, 5, 7, 9, 11]
        final = data.distance.sel(flow="rod").values[-1]
        assert summary["flows"]["rod"]["final_distance"] == final
        assert data.attrs["every"] == 2 and data.attrs["solver"] == "heun"
        assert data.loss.dtype == np.float64
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_overwritten_only_when_told(tmp_path):
    arguments = [*FAST, "--steps", 2, "--flows", "stable", "--out", tmp_path]
    assert invoke(*arguments).exit_code == 0
    before = (tmp_path / "summary.json").read_text()
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "summary.json").read_text() == before
    assert invoke(*arguments, "--overwrite").exit_code == 0


def test_hyperparameters_float32_and_optax_names(tmp_path):
    result = invoke(
        *FAST, "--optimizer", "adamw", "--set", "b2=0.9", "--set", "weight_decay=0.01",
        "--set", "nesterov=false", "--steps", 2, "--flows", "modulated", "--float32",
        "--solver", "tsit5", "--substeps", 2, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dtype"] == "float32" and summary["optimizer"] == "adamw"
    # (2/lr)(1+b1)/(1-b1), lowered by the weight decay's own curvature.
    assert summary["threshold"] == pytest.approx(190 * (1 - 0.01 * 0.2 / 2), rel=1e-4)


def test_a_diverging_run_is_reported(tmp_path):
    result = invoke(
        "--problem", "scalar-factorization", "--lr", 5.0, "--start", 0, "--steps", 40,
        "--flows", "stable", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0 < summary["run"]["diverged_at"] < 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problem", "mnist"], "digits-mlp"),
        (["--optimizer", "adamm"], "scalar-adam"),
        (["--optimizer", "lookahead"], "learning_rate"),
        (["--set", "b2=0.9"], "momentum"),
        (["--set", "momentum"], "NAME=VALUE"),
        (["--flows", "stable,centre"], "--flows centre"),
        (["--flows", "central", "--top", "0"], "top must be at least 1"),
        (["--flows", "central", "--optimizer", "adam"], "rodjax.flows.stable"),
        (["--flows", "principal", "--optimizer", "rmsprop"], "rodjax.flows.stable"),
        (["--problem-set", "widths=3"], "scalar-factorization takes start, target"),
        (["--problem-set", "start"], "--problem-set start: write NAME=VALUE"),
        (["--problem", "digits-cnn", "--problem-set", "n=0"], "n=0"),
        (["--problem", "cifar10-cnn"], "--problem-set path=..."),
        (["--problem", "cifar10-mlp", "--problem-set", "path=nowhere"], "nowhere"),
        (["--solver", "rk5"], "tsit5"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "7", "--every", "2"], "--every 2"),
        (["--start", "-1"], "--start"),
        (["--substeps", "0"], "--substeps"),
        (["--rank", "0"], "rank"),
        (["--optimizer", "heavy-ball", "--flows", "rod", "--rank", "3"], "modulated"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, arguments, words):
    out = tmp_path / "out"
    result = invoke(*FAST, "--out", out, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "names",
    [
        ("edge", "central"),
        pytest.param(choices.FLOWS, marks=pytest.mark.slow, id="all"),
    ],
)
def test_flows_run_and_report(tmp_path, names):
    result = invoke(
        "--problem", "berthier", "--lr", 0.3, "--start", 3, "--steps", 4, "--every", 2,
        "--flows", ",".join(names), "--substeps", 1, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    flows = json.loads((tmp_path / "summary.json").read_text())["flows"]
    assert list(flows) == list(names)
    assert all(row["diverged_at"] is None for row in flows.values())
    with xarray.open_dataset(tmp_path / "result.nc", engine="h5netcdf") as data:
        predicted = data.predicted_loss
        assert np.isfinite(predicted.sel(flow="central").values).all()
        assert np.isnan(predicted.sel(flow="edge").values).all()
        assert np.isfinite(data.loss.values).all()


TOYS = ("quadratic", "quartic-well", "factorization", "banana", "cosine")


@pytest.mark.parametrize(
    ("name", "settings"),
    [pytest.param(name, [], marks=pytest.mark.slow) for name in TOYS]
    + [
        ("berthier", []),
        pytest.param("digits-cnn", ["n=10", "channels=(2,)"], marks=pytest.mark.slow),
    ]
    + [("clusters-mlp", ["widths=(3,)"])],
)
def test_problems_run(tmp_path, name, settings):
    given = [word for setting in settings for word in ("--problem-set", setting)]
    result = invoke(
        "--problem", name, "--lr", 0.1, "--start", 0, "--steps", 2,
        "--flows", "stable", "--out", tmp_path, *given,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    # Networks report their accuracy.
    for row in (summary["run"], summary["flows"]["stable"]):
        assert ("final_accuracy" in row) == bool(settings)
        assert 0 <= row.get("final_accuracy", 0) <= 1
    assert ("final accuracy" in result.stdout) == bool(settings)


@pytest.mark.parametrize("name", [n for n in choices.PROBLEMS if "cifar10" not in n])
def test_every_named_problem_builds(name):
    problem = choices.problem(name, "float32")
    assert np.isfinite(problem.loss(problem.params))


def test_cifar10_by_path(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 3073), np.uint8)
    records[:, 0] = np.arange(6)
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes())
    settings = {
        "path": str(tmp_path),
        "n": 5,
        "widths": (3,),
        "classes": (0, 1, 2, 3, 4),
    }
    problem = choices.problem("cifar10-mlp", "float32", settings)
    assert problem.params["layers"][0]["kernel"].shape == (3072, 3)
    assert problem.params["layers"][2]["kernel"].shape == (3, 5)


def test_list_has_a_line_for_everything():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    names = [line[0] for line in lines if len(line) == 2]
    for name in (*choices.PROBLEMS, *choices.OPTIMIZERS, *choices.FLOWS):
        assert names.count(name) == 1
    assert max(map(len, result.stdout.splitlines())) < 90


@pytest.mark.parametrize("name", choices.OPTIMIZERS)
def test_every_named_optimizer_builds(name):
    assert hasattr(choices.optimizer(name, {})(0.1), "update")
