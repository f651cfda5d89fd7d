"""The example scripts: they run, and one that is killed goes on as if it were not."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optax
import pytest

from rodjax.training import STATUS

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(folder):
    return (folder / "log.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_cnn_goes_on(tmp_path, monkeypatch):
    module = example("digits_cnn")
    monkeypatch.setattr(module, "LOG", 2)
    monkeypatch.setattr(module, "SAVE", 4)
    module.train(tmp_path / "whole", 8)
    # Two steps of the second part were logged but not saved.
    module.train(tmp_path / "parts", 6)
    module.train(tmp_path / "parts", 8)
    lines = lines_of(tmp_path / "whole")
    assert lines == lines_of(tmp_path / "parts")
    found = [json.loads(line) for line in lines]
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    assert {line["status"] for line in found} <= set(STATUS)
    assert found[-1]["loss"] < found[0]["loss"]


def test_cnn_is_what_the_command_line_takes():
    module = example("digits_cnn")
    loss, params = module.problem()
    assert 0 < loss(params) < 10
    assert isinstance(module.optimizer(0.1), optax.GradientTransformation)


@pytest.mark.slow
def test_equinox_to_its_figure(tmp_path):
    module = example("equinox_mlp")
    losses, ratios = module.main(tmp_path / "mlp.png", before=6, after=12)
    assert losses[-1] < losses[0] and ratios[-1] > 0
    assert (tmp_path / "mlp.png").stat().st_size > 0


@pytest.mark.slow
def test_cnn_killed_and_resumed(tmp_path):
    def command(name, steps):
        script = str(EXAMPLES / "digits_cnn.py")
        return [sys.executable, script, str(tmp_path / name), "--steps", str(steps)]

    def steps_of(name):
        log = tmp_path / name / "log.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    subprocess.run(command("whole", 200), check=True)
    with subprocess.Popen(command("parts", 100_000)) as process:
        while process.poll() is None and steps_of("parts") < 13:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    logged = steps_of("parts")
    assert logged >= 13
    subprocess.run(command("parts", max(200, 10 * logged)), check=True)
    assert lines_of(tmp_path / "parts")[:20] == lines_of(tmp_path / "whole")
