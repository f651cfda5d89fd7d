"""The user's own problem on the command line: found, checked, run and swept."""

import json
import re
import sys
from pathlib import Path

import cli_runner
import jax
import numpy as np
import pytest
import xarray

from rodjax.cli._own import load

MINE = """
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from beside_it import STIFFNESS
from rodjax.problems import Problem


@dataclass
class Config:
    "Looks its module up where there are annotations of the future."
    width: int = 2


def bowl(stiff: float = 1.0, wide: int = 2):
    loss = lambda w: stiff * STIFFNESS * jnp.sum(w**2) / 2
    draw = lambda key: jax.random.normal(key, (wide,))
    size = lambda w: jnp.max(jnp.abs(w))
    return Problem("my bowl", loss, jnp.ones(wide), draw, {"size": size})


def pair(dtype="float16"):
    return lambda w: w["a"] ** 2 + jnp.sum(w["b"] ** 2), {"a": 1, "b": 0.5}


def numbers(dtype="float16"):
    params = {"a": 1.0, "b": np.ones(2, dtype)}
    return lambda w: w["a"] ** 2 + jnp.sum(w["b"] ** 2), params


def kinds(
    a: int, b: float, c: str, d: Path, e: Literal["x", "y"], f: int | None,
    g: str | None, h: tuple[int, ...], i: bool, j=1.0, k=(), l="mse", m=None, **rest,
):
    given = dict(locals())
    return Problem(repr(given), lambda w: w**2, 1.0)


class Made(tuple):
    def __new__(cls, start: float = 1.0):
        return super().__new__(cls, (lambda w: w**2, start))


ready = bowl()
narrow = partial(bowl, wide=1)
number = 3
square = lambda w: jnp.sum(w**2)
vector = lambda: (lambda w: w**2, jnp.ones(3))
aux = lambda: (lambda w: (jnp.sum(w), w), jnp.ones(3))
whole = lambda: (lambda w: jnp.array(1), jnp.ones(3))
ints = lambda: (square, {"n": jnp.ones(3, int)})
act = lambda: (square, {"act": jnp.tanh})
text = lambda: (square, np.array(["a"]))
empty = lambda: (square, {})
numpy = lambda: (lambda w: np.sum(np.sin(w)), np.ones(3))
swapped = lambda: (jnp.ones(2), square)
forgot = lambda: None
named = lambda name: Problem("m", square, jnp.ones(2), None, {name: square})
metric = lambda: Problem("m", square, jnp.ones(2), None, {"size": jnp.abs})
drawn = lambda: Problem("m", square, jnp.ones(2), lambda key: jnp.ones(3))


def fails(n=3):
    raise RuntimeError("no data\\nand more lines")
"""
FILES = {
    "mine.py": MINE,
    "beside_it.py": "STIFFNESS = 3.0\n",
    "a_package/__init__.py": "",
    "a_package/within.py": "from .data import ready\n",
    "a_package/data.py": "ready = (lambda w: w**2), 1.0\n",
    "a_package/broken.py": "import os\n\nimport nonesuch\n",
    "nothing.py": "",
    "syntax.py": "x = (1,\n",
    "by_import.py": "import syntax\n",
    "ends.py": "import sys\nsys.exit(3)\n",
    "notes.txt": "",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, which this process forgets again."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "settings", "name", "size"),
    [
        ("mine.py:ready", [], "my bowl", 2),
        ("mine.py:bowl", ["wide=1e1"], "my bowl", 10),
        ("./mine.py:narrow", [], "my bowl", 1),
        ("mine.py:narrow", ["wide=3"], "my bowl", 3),
        ("mine.py:Made", ["start=2"], "Made", 1),
        ("mine:bowl", [], "my bowl", 2),
        ("a_package.within:ready", [], "ready", 1),
        ("rodjax.problems:quadratic", ["spectrum=(1.0,0.3)"], "quadratic", 2),
    ],
)
def test_it_is_found_called_and_named(spec, settings, name, size):
    problem = load(spec, settings, "float64")
    assert problem.name == name
    assert sum(x.size for x in jax.tree.leaves(problem.params)) == size
    assert np.isfinite(problem.loss(problem.params))


def test_a_file_elsewhere_imports_what_is_beside_it(folder, monkeypatch):
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")
    problem = load(f"{folder / 'mine.py'}:bowl", ["stiff=2"])
    assert float(problem.loss(problem.params)) == 6.0
    assert set(problem.metrics) == {"size"} and problem.draw is not None


def test_values_are_of_the_types_that_the_function_says():
    given = {
        "a": "1e3", "b": "2", "c": "3", "d": "4", "e": "x", "f": "none", "g": "null",
        "h": "[1,2]", "i": "true", "j": "5", "k": "[3]", "l": "6", "m": "7", "n": "8",
    }  # fmt: skip
    problem = load("mine.py:kinds", [f"{k}={v}" for k, v in given.items()])
    expected = {
        "a": 1000, "b": 2.0, "c": "3", "d": Path("4"), "e": "x", "f": None, "g": "null",
        "h": (1, 2), "i": True, "j": 5.0, "k": (3,), "l": "6", "m": 7, "rest": {"n": 8},
    }  # fmt: skip
    assert problem.name == repr(expected)


def test_the_precision_is_given_where_it_is_taken():
    b = lambda *given: load("mine.py:numbers", *given).params["b"].dtype
    assert b([], "float32") == np.float32
    assert b([], None) == np.float16
    assert b(["dtype=float64"], "float32") == np.float64


def test_a_changed_file_is_read_again(folder):
    file = folder / "mine.py"
    for value in ("7", "8"):
        file.write_text(f"ready = (lambda w: {value} * w**2), 1.0")
        problem = load("mine.py:ready")
        assert float(problem.loss(problem.params)) == float(value)


A_PROBLEM = "where a rodjax.problems.Problem or the pair (loss, parameters)"


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        ("nowhere.py:f", [], "there is no file nowhere.py"),
        ("a_package/within:f", [], "a_package/within is no Python file"),
        ("notes.txt:f", [], "notes.txt is no Python file"),
        ("nowhere:f", [], "there is no module nowhere, neither in the current folder"),
        ("a_package.no:f", [], "there is no module a_package.no, neither"),
        ("a-b:f", [], "'a-b' is neither a file that ends in .py nor a module"),
        ("mine.py:bowls", [], "mine.py has no bowls; it has bowl, pair, numbers, kin"),
        ("mine.py", [], "write mine.py:NAME; it has bowl, pair, numbers, kinds, Made"),
        ("nothing.py:f", [], "nothing.py has no f; it has no Problem, and no function"),
        ("syntax.py:f", [], "syntax.py:1: SyntaxError: '(' was never closed"),
        ("by_import.py:f", [], "by_import.py cannot be imported: syntax.py:1: Syntax"),
        ("a_package/broken.py:f", [], "a_package/broken.py:3: ModuleNotFoundError: No"),
        ("a_package.broken:f", [], "a_package/broken.py:3: ModuleNotFoundError: No mo"),
        ("a_package/within.py:f", [], "name it as package.module:NAME, from the folde"),
        ("ends.py:f", [], "ends.py:2: SystemExit: 3"),
        ("mine.py:fails", ["n=4"], "fails(n=4) fails: mine.py:"),
        ("mine.py:number", [], f"number is of type int, {A_PROBLEM}, or a function"),
        ("mine.py:forgot", [], f"forgot returns None, {A_PROBLEM} is wanted"),
        ("mine.py:swapped", [], "swapped returns a tuple of array and function, where"),
        ("mine.py:square", [], "square needs w: give it --problem-set w=..., or name"),
        ("mine.py:vector", [], "its loss returns an array of shape (3,), where a scal"),
        ("mine.py:aux", [], "its loss returns a tuple of array and array, where a sca"),
        ("mine.py:whole", [], "its loss returns int64, where a real float is wanted"),
        ("mine.py:numpy", [], "TracerArrayConversionError"),
        ("mine.py:pair", [], "its parameters['a'] have dtype int64, where real float"),
        ("mine.py:ints", [], "its parameters['n'] have dtype int64"),
        ("mine.py:act", [], "its parameters['act'] are of type function, where arrays"),
        ("mine.py:text", [], "its parameters have dtype <U1, where real floats"),
        ("mine.py:empty", [], "its parameters are empty"),
        ("mine.py:named", ["name=loss"], "its metric 'loss' has the name of what is"),
        ("mine.py:metric", [], "its metric 'size' returns an array of shape (2,)"),
        ("mine.py:drawn", [], "its draw gives parameters of another structure, shape"),
        ("mine.py:bowl", ["wid=3"], "--problem-set wid=...: bowl takes stiff, wide"),
        ("mine.py:bowl", ["wide=3.5"], "--problem-set wide=3.5: bowl takes wide as in"),
        ("mine.py:bowl", ["stiff=big"], "--problem-set stiff=big: bowl takes stiff as"),
        ("mine.py:bowl", ["wide"], "--problem-set wide: write NAME=VALUE"),
        ("mine.py:forgot", ["n=3"], "--problem-set n=...: forgot takes no arguments"),
        ("mine.py:ready", ["n=3"], "--problem-set n=...: ready is a problem as it st"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(spec, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(spec, settings)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith((f"--problem {spec}: ", "--problem-set "))


FAST = ["--warmup", 2, "--steps", 4, "--flows", "stable"]


def test_the_commands_refuse_before_anything_runs(folder):
    out = folder / "out"
    for command in ("run", "sweep"):
        found = cli_runner.invoke(
            command, "--problem", "mine.py:vector", *FAST, "--out", out
        )
        assert found.exit_code == 2
        assert len(found.stderr.splitlines()) == 1 and "Traceback" not in found.output
        assert found.stderr.startswith(f"rodjax {command}: --problem mine.py:vector: ")
    seeds = "--problem", "mine.py:Made", "--seeds", 2, "--every", 4
    found = cli_runner.invoke("sweep", *seeds, *FAST, "--out", out)
    assert found.exit_code == 2
    assert "--seeds: the start of mine.py:Made is not drawn; give its" in found.stderr
    found = cli_runner.invoke("run", "--problem", "bowl", *FAST, "--out", out)
    assert "or name your own as FILE.py:NAME" in found.stderr
    assert not out.exists()


def test_run(folder):
    found = cli_runner.invoke(
        "run", "--problem", "mine.py:bowl", "--problem-set", "stiff=2", "--lr", 0.1,
        *FAST, "--float32", "--out", folder / "out",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith("my bowl, gd, lr 0.1, steps 2 + 4, float32;")
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["problem"] == "my bowl" and summary["dtype"] == "float32"
    # Of the curvature 6 everywhere, at the last midpoint.
    assert summary["flows"]["stable"]["final_sharpness_ratio"] == pytest.approx(0.3)
    last = (0.4**5 + 2 * 0.4**6 + 0.4**7) / 4
    assert summary["run"]["final_size"] == pytest.approx(last, rel=1e-4)


def test_sweep_over_starts_goes_on_unless_the_problem_has_changed(folder):
    """Where the file lies and how it is named makes no other problem of it."""
    out = folder / "out"
    sweep = lambda spec: cli_runner.invoke(
        "sweep", "--problem", spec, "--lr", "0.1,0.2", "--seeds", 2, "--every", 4,
        *FAST, "--out", out,
    )  # fmt: skip
    first = sweep("mine.py:bowl")
    assert first.exit_code == 0, first.output
    with xarray.open_dataset(out / "result.nc", engine="h5netcdf") as data:
        size = data.size.sel(flow="run").values
        assert size.shape == (2, 2, 2) and data.attrs["problem"] == "my bowl"
        assert len(np.unique(size[..., 0])) == 4
    again = sweep(f"{folder / 'mine.py'}:bowl")
    assert f"nothing left to do of 24 steps in {out}" in again.stderr
    (folder / "mine.py").write_text(MINE.replace("w**2) / 2", "w**4) / 2"))
    changed = sweep("mine.py:bowl")
    assert changed.exit_code == 2 and "program is another" in changed.stderr


def test_the_file_in_the_documentation(folder):
    page = Path(__file__).parents[1] / "docs" / "how-to" / "command-line.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith("# mine.py")]
    (folder / "mine.py").write_text(block)
    with jax.numpy_rank_promotion("allow"):
        problem = load("mine.py:net", ["width=4"], "float64")
    assert problem.params["in"].shape == (4,) and "worst" in problem.metrics
