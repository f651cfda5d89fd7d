"""Sweeps over several devices and processes give the bits of one, without waiting."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep_worker as worker

from rodjax.sweeps._program import check_threads

#: 15 lanes by 2 on each of 4 devices at a time, and in 4 chunks of time.
WIDE, CHUNKS = 8, 8
FILES = ["checkpoints", "result.nc", "sweep.json"]


def alone():
    """What one device comes to, 2 lanes at a time."""
    return worker.alone("--lane-chunk", 2)[2]


def near(found, expected):
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"flow"}:
        np.testing.assert_allclose(found[name], expected[name], 1e-10, 1e-14, name)


def apart(lines, calls, lanes):
    """Every call's outputs lay on 4 devices, of which none waited for another."""
    assert len(lines) == calls
    for line in lines:
        program = line["program"]
        assert program["devices"] == [4] and program["widths"] == [lanes]
        assert "while" in program["operations"]
        for name in program["operations"]:
            assert not name.startswith(("all-", "reduce-scatter", "collective-"))
            assert not name.startswith(("send", "recv"))


def by_sweep(save, count):
    """The lines said at the chunks of each sweep."""
    lines = [line for line in worker.said(save) if "done" in line]
    return [[line for line in lines if line["sweep"] == i] for i in range(count)]


@pytest.mark.slow
def test_lanes_diverge_and_stay():
    """What is compared below is not empty on either side."""
    lost = np.isfinite(alone()["diverged_at"])
    assert lost[0].any() and not lost[0].all()


@pytest.mark.slow
def test_four_devices(tmp_path):
    """One device's bits at the same lanes of each, nothing but rounding at others."""
    words = ("--devices", 4, "--lane-chunk", WIDE, 0)
    worker.wait([worker.start("--save", tmp_path, *words)])
    wide, whole = worker.saved(tmp_path, 0), worker.saved(tmp_path, 1)
    worker.same_bits(wide, alone())
    near(whole, alone())
    ran = by_sweep(tmp_path, 2)
    apart(ran[0], CHUNKS, 2)
    apart(ran[1], CHUNKS // 2, 4)


def pair(save, *words):
    """Start two processes of two devices each, with these words for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--devices", 2, "--processes", 2, "--port", port, *words)
    words = ("--lane-chunk", WIDE, *words)
    return [
        worker.start("--save", save / str(i), "--process", i, *words) for i in (0, 1)
    ]


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Both return all of the bits of one, in memory and from the file in a shared out.

    Stopped on their way they go on from there, and called once more there is nothing to
    do and the file is the same.
    """
    out = tmp_path / "out"
    words = ("--stop", 5, "--out", out, out, out, worker.NONE)
    worker.wait(pair(tmp_path, *words))
    known = [worker.said(tmp_path / str(i))[0]["program"]["digests"] for i in (0, 1)]
    assert known[0] == known[1]
    for i in (0, 1):
        first, second, again, memory = by_sweep(tmp_path / str(i), 4)
        assert len(first) == 5 and len(second) == CHUNKS - 5
        assert second[0]["resumed"] == first[-1]["done"]
        assert not again and len(memory) == CHUNKS
        apart([*first, *second, *memory], 2 * CHUNKS, 2)
        for sweep in (1, 2, 3):
            worker.same_bits(worker.saved(tmp_path / str(i), sweep), alone())
    assert sorted(x.name for x in out.iterdir()) == FILES


@pytest.mark.slow
def test_two_killed_processes(tmp_path):
    """Processes of their own go on from where others were killed."""
    out, first, second = tmp_path / "out", tmp_path / "first", tmp_path / "second"
    worker.wait(pair(first, "--out", out), (out / "checkpoints/rows/5").exists)
    assert not (out / "result.nc").exists()
    worker.wait(pair(second, "--out", out))
    for i in (0, 1):
        (ran,) = by_sweep(second / str(i), 1)
        assert 0 < len(ran) <= CHUNKS - 5 and ran[0]["resumed"] > 0
        worker.same_bits(worker.saved(second / str(i)), alone())
    assert sorted(x.name for x in out.iterdir()) == FILES


class Fake:
    """A device of a CPU."""

    platform, process_index = "cpu", 0


@pytest.mark.parametrize(
    ("devices", "nproc", "text", "refused"),
    [
        (2, "2", "custom_call @lapack_dsyevd_ffi", True),
        (4, "2", "custom_call @lapack_dsyevd_ffi", True),
        (2, "4", "custom_call @lapack_dsyevd_ffi", False),
        (1, "1", "custom_call @lapack_dsyevd_ffi", False),
        (4, "2", "dot_general", False),
    ],
)
def test_what_would_wait_for_ever_is_refused(
    monkeypatch, devices, nproc, text, refused
):
    """Found as a deadlock of two devices in LAPACK's batched dsyevd, on two cores."""
    monkeypatch.setenv("NPROC", nproc)
    given = (Fake(),) * devices
    if refused:
        with pytest.raises(ValueError, match="NPROC to twice the devices"):
            check_threads(given, text)
    else:
        check_threads(given, text)


def test_the_sharpness_is_found_with_lapack():
    """By this name the refusal above knows it."""
    program = jax.jit(jax.vmap(jnp.linalg.eigh)).lower(jnp.zeros((2, 3, 3)))
    assert "lapack" in program.as_text()
