"""Sweeps over several devices and processes give the bits of one, without waiting."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep_worker as worker

from rodjax.sweeps import check_threads

#: 15 lanes by 2 on each of 4 devices at a time, and in 4 chunks of time.
WIDE, CHUNKS = ("--lane-chunk", 8), 8


def near(found, expected):
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"flow"}:
        np.testing.assert_allclose(found[name], expected[name], 1e-10, 1e-14, name)


def apart(lines, calls, lanes):
    """Every call's outputs lay on 4 devices, of which none waited for another."""
    calls_seen = [line for line in lines if "operations" in line]
    assert len(calls_seen) == calls
    for line in calls_seen:
        assert line["devices"] == [4] and line["widths"] == [lanes]
        assert "while" in line["operations"]
        for name in line["operations"]:
            assert not name.startswith(("all-", "reduce-scatter", "collective-"))
            assert not name.startswith(("send", "recv"))


def test_lanes_diverge_and_stay():
    """What is compared below is not empty on either side."""
    lost = np.isfinite(worker.alone()["diverged_at"])
    assert lost[0].any() and not lost[0].all()


@pytest.mark.parametrize(
    "words, calls, lanes", [(WIDE, CHUNKS, 2), ((), CHUNKS // 2, 4)]
)
def test_four_devices(tmp_path, words, calls, lanes):
    """One device's bits at the same lanes of each, nothing but rounding at others."""
    worker.wait([worker.start("--save", tmp_path, "--devices", 4, *words)])
    found = worker.saved(tmp_path)
    if lanes == 2:
        worker.same_bits(found, worker.alone("--lane-chunk", "2"))
    near(found, worker.alone())
    apart(worker.said(tmp_path), calls, lanes)


def pair(save, *outs):
    """Start two processes of two devices each, which make one sweep for each out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (*WIDE, "--devices", 2, "--processes", 2, "--port", port, "--out", *outs)
    return [
        worker.start("--save", save / str(i), "--process", i, *words) for i in (0, 1)
    ]


def test_two_processes(tmp_path):
    """Both return all of the bits of one, in memory and from the file in a shared out.

    Killed on their way they go on from there, and called once more there is nothing to
    do and the file is the same.
    """
    out, first, second = tmp_path / "out", tmp_path / "first", tmp_path / "second"
    worker.wait(pair(first, out), (out / "checkpoints/rows/5").exists)
    assert not (out / "result.nc").exists()

    worker.wait(pair(second, out, out, worker.NONE))
    expected = worker.alone("--lane-chunk", "2")
    for i in (0, 1):
        for sweep in range(3):
            worker.same_bits(worker.saved(second / str(i), sweep), expected)
        lines = [x for x in worker.said(second / str(i)) if "done" in x]
        ran = {sweep: [x for x in lines if x["sweep"] == sweep] for sweep in range(3)}
        assert 0 < len(ran[0]) <= CHUNKS - 5 and ran[0][0]["resumed"] > 0
        assert not ran[1] and len(ran[2]) == CHUNKS
        apart(worker.said(second / str(i)), len(ran[0]) + len(ran[2]), 2)
    assert sorted(x.name for x in out.iterdir()) == [
        "checkpoints",
        "result.nc",
        "sweep.json",
    ]


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
