"""The benchmark of work and precision, on a few points."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import work_precision

    yield work_precision
    for name in ("work_precision", "_rows", "_common"):
        sys.modules.pop(name, None)


def test_a_few_points_and_going_on(benchmark_module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--tiny", "--out", str(tmp_path)])
    benchmark_module.main()
    found = json.loads((tmp_path / "work-precision.json").read_text())["berthier"]
    points = {(p["flow"], p["solver"]): p for p in found["points"]}
    assert len(points) == 4 and (tmp_path / "work-precision.png").exists()
    # What all others are relative to.
    assert abs(points["stable", "heun x 4"]["error"] - 1) < 1e-6
    costs = {key: p["evaluations"] for key, p in points.items()}
    assert costs["stable", "heun x 4"] == 8.0
    assert costs["modulated, unit", "heun x 4"] == 16.0
    # For every ten steps a first slope, and five times three stages, of 2 gradients.
    assert costs["modulated, unit", "rkc+bea x 1/2"] == 2 * (1 + 5 * 3) / 10
    assert 0 < points["modulated, unit", "rkc+bea x 1/2"]["error"] < 0.5
    assert all(
        p["times plain"] > 0 and p["diverged at"] is None for p in found["points"]
    )
    capsys.readouterr()
    benchmark_module.main()
    assert capsys.readouterr().out.count("berthier") == 0
    again = json.loads((tmp_path / "work-precision.json").read_text())["berthier"]
    assert again["points"] == found["points"]


def test_the_frontier_is_of_what_no_other_beats(benchmark_module):
    point = lambda work, error, lost=None: {
        "evaluations": work,
        "error": error,
        "diverged at": lost,
    }
    best = [point(1, 0.5), point(3, 0.2)]
    beaten = [point(2, 0.6), point(4, 0.2), point(0.5, 0.01, 7.0), point(None, 0.01)]
    found = benchmark_module.frontier([*beaten, *best], "evaluations")
    assert found == best
