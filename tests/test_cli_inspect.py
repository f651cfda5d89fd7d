"""`rodjax inspect`: checkpoints of a training loop, where they stand, what comes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import xarray
from cli_runner import invoke

import rodjax as rj

MINE = """
import jax.numpy as jnp, optax

def problem():
    return lambda w: 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * w["a"] ** 2), \\
        {"a": jnp.array([1.0, 2.0])}

def optimizer(lr, momentum=None):
    return optax.sgd(lr, momentum=momentum)

ready = optax.sgd(0.1)

def peaked(lr):
    return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, lr, 5, 50))

def nothing(lr):
    return None
"""
SPECTRUM = np.array([3.0, 1.0])
LR, STEPS = 0.5, (2, 4, 6)


def loss(params):
    return 0.5 * jnp.sum(SPECTRUM * params["a"] ** 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's file, and checkpoints of gradient descent that was watched."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "mine.py").write_text(MINE)
    tx = optax.chain(rj.training.watch(optax.sgd(LR), every=2), optax.identity())
    params = {"a": jnp.array([1.0, 2.0], jnp.float32)}
    state = tx.init(params)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder / "ck", options=options) as manager:
        for step in range(1, STEPS[-1] + 1):
            extra = {"value_fn": loss}
            updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
            params = optax.apply_updates(params, updates)
            if step in STEPS:
                saved = {"params": params, "opt": {"state": state}}
                manager.save(step, args=ocp.args.StandardSave(saved))
    return folder


def inspect(folder, out, *more):
    spec = f"{folder / 'mine.py'}"
    return invoke(
        "inspect",
        folder / "ck",
        f"--problem={spec}:problem",
        f"--optimizer={spec}:optimizer",
        f"--lr={LR}",
        "--opt-state=opt.state.0",
        f"--out={out}",
        *more,
    )


def test_every_checkpoint_and_a_forecast(folder, tmp_path):
    out = tmp_path / "out"
    found = inspect(folder, out, "--forecast=16", "--lrs=0.25,0.5,2.0", "--runs")
    assert found.exit_code == 0, found.output
    data = xarray.open_dataset(out / "result.nc", engine="h5netcdf")
    assert data.step.values.tolist() == list(STEPS)
    np.testing.assert_allclose(data.sharpness_ratio, LR * 3 / 2, rtol=1e-5)
    # Every step multiplies the coordinates by 1 - lr times their curvature.
    w = np.array([1.0, 2.0]) * (1 - LR * SPECTRUM) ** np.array(STEPS)[:, None]
    np.testing.assert_allclose(data.loss, 0.5 * (w**2) @ SPECTRUM, rtol=1e-5)
    slope, bend = (w**2) @ SPECTRUM**2, (w**2) @ SPECTRUM**3
    np.testing.assert_allclose(data.step_curvature, LR * bend / slope, rtol=1e-4)
    # Of a quadratic: half the curvature along the step.
    np.testing.assert_allclose(data.realized_edge, LR * bend / slope / 2, rtol=1e-4)
    ahead = xarray.open_dataset(out / "forecast.nc", engine="h5netcdf")
    assert dict(ahead.loss.sizes) == {"flow": 3, "lr": 3, "step": 17}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["largest_lr"]["run"] == pytest.approx(0.5)
    assert [row["status"] for row in summary["checkpoints"]] == ["below"] * 3
    assert {path.name for path in out.iterdir()} == {
        "summary.json", "result.nc", "plot.png", "forecast.nc", "forecast.png",
    }  # fmt: skip
    for name, lr in (("result", "lr 0.5, "), ("forecast", "")):
        viewed = invoke("view", out / f"{name}.nc")
        assert viewed.exit_code == 0, viewed.output
        page = (out / f"{name}.html").read_text(encoding="utf-8")
        title = f"problem, {folder}/mine.py:optimizer, {lr}float32"
        assert f"<title>{title}</title>" in page
    again = inspect(folder, out)
    assert again.exit_code == 2 and "--overwrite" in again.output


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lr=0"], "--lr 0.0: it must be positive"),
        (["--products=0"], "--products 0: it must be at least 1"),
        (["--forecast=0"], "--forecast 0: it must be at least 1"),
        (["--runs"], "--lrs and --runs want a forecast"),
        (["--forecast=4", "--lrs=-1,1"], "learning rates must be positive"),
        (["--params=weights"], "nothing at weights: instead of weights it has"),
        (["--opt-state=opt.state.7"], "nothing at opt.state.7"),
        (["--optimizer=adam"], "opt_state has no leaf [0].count"),
        (["--problem=quadratic"], "checkpoint 2: params"),
    ],
)
def test_bad_options_end_in_a_line(folder, tmp_path, more, words):
    found = inspect(folder, tmp_path / "out", *more)
    assert found.exit_code == 2, found.output
    line = found.output.strip().splitlines()[-1]
    assert line.startswith("rodjax inspect: ") and words in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ready", "where a function from the learning rate"),
        ("nothing", "nothing returns None, where an optax.GradientTransformation"),
        ("peaked", "multiply a schedule whose peak is one"),
        ("absent", "mine.py has no absent"),
    ],
)
def test_an_optimizer_that_is_none(folder, tmp_path, name, words):
    spec = f"{folder / 'mine.py'}:{name}"
    found = inspect(folder, tmp_path / "out", f"--optimizer={spec}")
    assert found.exit_code == 2 and words in found.output
    wrong = inspect(folder, tmp_path / "out", "--set=b1=0.5")
    assert wrong.exit_code == 2 and "cannot be called with a learning" in wrong.output


def test_directories_without_checkpoints(folder, tmp_path):
    for place, words in ((tmp_path / "no", "no directory"), (tmp_path, "no finished")):
        found = invoke("inspect", place, "--problem=quadratic", f"--out={tmp_path}/o")
        assert found.exit_code == 2 and words in found.output


def test_run_takes_the_users_optimizer(folder, tmp_path):
    spec = f"{folder / 'mine.py'}"
    found = invoke(
        "run", f"--problem={spec}:problem", f"--optimizer={spec}:optimizer",
        "--set=momentum=0.5", "--lr=0.5", "--steps=4", "--flows=stable",
        f"--out={tmp_path / 'run'}",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["threshold"] == pytest.approx(6.0)
