"""A sweep that was stopped goes on where it was, to the same bits."""

import json
import random
import re
import shutil
import time

import diffrax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sweep_worker as worker
from helpers import unchecked

import rodjax as rj
from rodjax.sweeps import _sweep as module

#: Two chunks of lanes, of four chunks of time each.
EACH, CHUNKS = 4, 8
WORDS = ("--lane-chunk", 8, "--flow", "stable")
ARGS = worker.options(WORDS)
SGD, DRAW, FLOWS, KEEP = worker.problem(ARGS.flow, ARGS.keep)
#: What `worker.sweep` asks for.
ASKED = {
    "steps": 20,
    "grid": {"lr": [0.05, 0.3, 0.6], "seed": range(5)},
    "flows": FLOWS,
    "keep": KEEP,
    "lane_chunk": 8,
    "time_chunk": ARGS.time_chunk,
}


def sweep(out, **changed):
    """The values of a sweep, and its chunks' `Status`."""
    start = {"params": None, "draw": None if "params" in changed else DRAW}
    asked = {"dynamics": SGD} | start | ASKED | {"out": out} | changed
    seen = []
    with rj.sweep(**asked, progress=seen.append) as data:
        return worker.values(data), seen


def contents(folder):
    """Every file, with what is in it and when that was written."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    return [(x, x.read_bytes(), x.stat().st_mtime_ns) for x in files]


@pytest.fixture(scope="module")
def whole():
    """The result of a sweep that nothing has stopped."""
    return sweep(None)[0]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A directory as it was after every chunk; the last holds a result, too."""
    folder = tmp_path_factory.mktemp("states")
    out, copies = folder / "out", [folder / str(i) for i in range(CHUNKS)]

    def copy(status):
        shutil.copytree(out, next(x for x in copies if not x.exists()))

    worker.sweep(ARGS, out=out, progress=copy).close()
    return [*copies[:-1], out]


@pytest.fixture
def at(states, tmp_path):
    """A copy of the directory after a chunk, its places being those after another."""

    def copied(chunk, places=None):
        out = tmp_path / "out"
        shutil.copytree(states[chunk], out)
        if places is not None:
            folder = out / "checkpoints/places"
            shutil.rmtree(folder)
            folder.mkdir()
            if places >= 0:
                before = states[places] / "checkpoints/places"
                shutil.copytree(before, folder, dirs_exist_ok=True)
        return out

    return copied


def test_on_disk_is_as_in_memory(states, whole):
    worker.same_bits(sweep(states[-1])[0], whole)


#: The first, those on both sides of a chunk of lanes, and the one before the last.
TELLING = (0, EACH - 1, EACH, CHUNKS - 2)


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(i, marks=() if i in TELLING else pytest.mark.slow)
        for i in range(CHUNKS - 1)
    ],
)
def test_stopped_after_a_chunk(at, whole, chunk):
    """What was cut off in mid-write is ignored and removed."""
    out = at(chunk)
    cut = [
        out / "result.nc.part",
        out / "sweep.json.part",
        out / f"checkpoints/rows/{chunk + 1}.orbax-checkpoint-tmp/rows/d/0",
        out / f"checkpoints/places/{chunk + 1}.orbax-checkpoint-tmp/places/d/0",
    ]
    for file in cut:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"{")
    found, seen = sweep(out)
    worker.same_bits(found, whole)
    assert len(seen) == CHUNKS - 1 - chunk
    assert len({status.resumed for status in seen}) == 1
    assert seen[0].done - seen[0].resumed == (8 if chunk + 1 < EACH else 7) * 5
    assert seen[-1].done == seen[-1].total == 15 * 20
    assert seen[-1].diverged == np.isfinite(whole["diverged_at"][0]).sum()
    assert not any(file.exists() for file in cut)


@pytest.mark.parametrize(
    "chunk, places",
    [(0, -1), pytest.param(1, 0, marks=pytest.mark.slow), (4, 2), (6, 5)],
)
def test_stopped_between_rows_and_places(at, whole, chunk, places):
    """The chunk is done again, from the places before it."""
    found, seen = sweep(at(chunk, places))
    worker.same_bits(found, whole)
    assert len(seen) == CHUNKS - chunk


@pytest.mark.parametrize("chunk, lost, again", [(6, 6, 4), (4, 4, 4), (7, 2, 0)])
def test_rows_lost(at, whole, chunk, lost, again):
    """What was lost is done again, if need be from the start of its lanes."""
    out = at(chunk)
    shutil.rmtree(out / f"checkpoints/rows/{lost}")
    found, seen = sweep(out)
    worker.same_bits(found, whole)
    assert len(seen) == CHUNKS - again
    found, seen = sweep(out)
    worker.same_bits(found, whole)
    assert not seen


def test_finished(at, whole):
    """Called again there is nothing to compute; a lost result is put together."""
    out = at(CHUNKS - 1)
    (out / "result.nc").unlink()
    checkpoints = contents(out / "checkpoints")
    found, seen = sweep(out)
    worker.same_bits(found, whole)
    assert not seen and contents(out / "checkpoints") == checkpoints


def test_chunks_not_named_are_those_stored(at, whole):
    found, seen = sweep(at(2), lane_chunk=None, time_chunk=None)
    worker.same_bits(found, whole)
    assert len(seen) == CHUNKS - 3


def refused(out, **changed):
    """What differs, by what the refusal says; the directory is as it was."""
    before = contents(out)
    with pytest.raises(ValueError, match="other settings") as error:
        sweep(out, **changed)
    assert contents(out) == before
    said = re.fullmatch(r".*other settings: (.*)\. Use the same.*", str(error.value))
    return {re.split(" was | is ", part)[0] for part in said[1].split("; ")}


CHANGED = [
    ({"steps": 40}, {"steps"}),
    ({"warmup": 3}, {"warmup"}),
    ({"every": 5}, {"every"}),
    ({"grid": {"lr": [0.05, 0.3], "seed": range(5)}}, {"grid lr"}),
    ({"grid": {"lr": [0.05, 0.3, 0.6], "seed": range(1, 6)}}, {"grid seed"}),
    ({"grid": {("lr", "seed"): [[0.05, 0.3, 0.6], range(3)]}}, {"zipped", "grid seed"}),
    ({"flows": {"other": FLOWS["stable"]}}, {"flows"}),
    ({"flows": None}, {"flows"}),
    ({"solver": diffrax.Midpoint()}, {"solver"}),
    ({"substeps": 2}, {"substeps"}),
    ({"lane_chunk": 5}, {"lane_chunk"}),
    ({"time_chunk": 10}, {"time_chunk"}),
    ({"settings": {"label": "b"}}, {"label"}),
    ({"steps": 10, "substeps": 3}, {"steps", "substeps"}),
]


@pytest.mark.parametrize("changed, names", CHANGED)
def test_other_settings_are_refused(states, monkeypatch, changed, names):
    """By name, before anything is compiled or written."""
    monkeypatch.setattr(module, "fit", None)
    assert refused(states[2], **changed) == names


def small(**changed):
    """What a sweep without flows is asked for."""
    return {"flows": {}, "grid": {"lr": 0.1}, "keep": lambda w: None} | changed


def quadratic(data):
    return rj.dynamics(optax.sgd, lambda w: jnp.sum((w * data) ** 2))


def test_another_program_is_refused_and_so_is_other_data(tmp_path):
    """They are told apart, although nothing else differs."""
    data = np.linspace(1.0, 2.0, 20)
    same = small(params=jnp.ones(20), dynamics=quadratic(data))
    assert len(sweep(tmp_path, **same)[1]) == EACH
    # By its values, not by where it lies.
    same["dynamics"] = quadratic(data.copy())
    assert not sweep(tmp_path, **same)[1]
    near = data + 1e-12 * (np.arange(20) == 7)
    assert refused(tmp_path, **same | {"dynamics": quadratic(near)}) == {"data"}
    other = rj.dynamics(optax.sgd, lambda w: jnp.sum(jnp.cosh(w)))
    assert "program" in refused(tmp_path, **same | {"dynamics": other})


def test_other_parameters_are_refused(tmp_path, monkeypatch):
    """By their values, types and structure; NaN and NumPy's numbers are themselves."""
    same = small(
        params=(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.1])),
        dynamics=rj.dynamics(optax.sgd, lambda w: jnp.sum((w[0] * w[1]) ** 2)),
        warmup=np.int64(0),
        settings={"target": np.nan},
    )
    with unchecked():
        assert len(sweep(tmp_path, **same)[1]) == EACH
        assert not sweep(tmp_path, **same)[1]
        monkeypatch.setattr(module, "fit", None)
        a, b = same["params"]
        for params in ((a, b + 1e-12), (b, a), [a, b], (a, b.astype(jnp.float32))):
            assert refused(tmp_path, **(same | {"params": params})) == {"params"}


def test_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", None)
    file = tmp_path / "out"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is not a directory"):
        sweep(file)
    assert file.read_text() == "mine"


def test_checkpoints_of_nobody_knows_what_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", None)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"no sweep\.json to say of what"):
        sweep(tmp_path)


def test_other_devices_are_refused_by_name(tmp_path, monkeypatch):
    """Chunks of lanes for other devices would not come to the same bits."""
    monkeypatch.setattr(module, "fit", None)
    stored = {"devices": "2 x cpu", "lane_chunk": 8, "time_chunk": 5}
    (tmp_path / "sweep.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="devices was 2 x cpu, is now 1 x cpu"):
        sweep(tmp_path)


def unfinished(out):
    """What is in the midst of being written: rows, places, or the result."""
    cut = {x.parent.name for x in out.glob("checkpoints/*/*orbax-checkpoint-tmp*")}
    return cut | {x.name for x in out.glob("result.nc.part")}


def moment(out, save, draw, what):
    """When to kill a process: a function that says whether to do so now.

    While it writes `what`, or if that is `None` at any time; later than the first time,
    now and then, for else it would not get anywhere.
    """
    chunks = 0 if what == "result.nc.part" else draw.randrange(3)
    delay, began = draw.uniform(0.0, 0.3), []

    def now():
        if len([x for x in worker.said(save) if "done" in x]) < chunks:
            return False
        if what is not None:
            return what in unfinished(out)
        began.append(time.monotonic())
        return began[-1] > began[0] + delay

    return now


@pytest.mark.slow
@pytest.mark.parametrize("kills, time_chunk", [(4, 2), (16, 1)])
def test_killed_processes(tmp_path, kills, time_chunk):
    """A process killed again and again comes to the bits of one that was not.

    Killed while it writes checkpoints and the result, too; and it goes on from where it
    was instead of from the start.
    """
    words = (*WORDS, "--time-chunk", time_chunk, "--keep", 5000)
    out, draw = tmp_path / "out", random.Random(kills)
    writing = [("rows", "places", None)[i % 3] for i in range(kills - 1)]
    cut, resumed = [], []
    for i, what in enumerate([*writing, "result.nc.part"]):
        save = tmp_path / str(i)
        processes = [worker.start("--save", save, "--out", out, *words)]
        worker.wait(processes, moment(out, save, draw, what))
        cut.append(unfinished(out))
        assert not (out / "result.nc").exists()
        resumed += [x["resumed"] for x in worker.said(save) if "done" in x][:1]
    assert ({"rows"} in cut or {"places"} in cut) and cut[-1] == {"result.nc.part"}
    assert resumed == sorted(resumed) and len({*resumed}) > 1

    save = tmp_path / "whole"
    worker.wait([worker.start("--save", save, "--out", out, *words)])
    assert not unfinished(out)
    worker.same_bits(worker.saved(save), worker.alone(*words)[8])
