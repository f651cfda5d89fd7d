"""Progress as a terminal shows it, and as a file does."""

import io
import sys
from pathlib import Path

import pytest

from rodjax.cli._progress import Bar
from rodjax.cli._sweep import describe, tell
from rodjax.sweeps import Status


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """Makes standard error one of a kind."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def of(kind):
        monkeypatch.setattr(sys, "stderr", kind())
        return sys.stderr

    return of


def two_stages(**settings):
    with Bar(**settings) as bar:
        assert not bar.moved
        bar.begin("first", 40)
        for done in range(1, 41):
            bar.move(done, f"loss {done}")
        assert bar.moved
        bar.say("a word")
        bar.begin("second", 8)
        bar.move(3, "loss 3")


def test_a_few_plain_lines_in_a_file(stderr):
    written = stderr(io.StringIO)
    two_stages(lines=4)
    assert written.getvalue().splitlines() == [
        "first: compiling",
        "first:  25% loss 10",
        "first:  50% loss 20",
        "first:  75% loss 30",
        "first: 100% loss 40",
        "a word",
        "second: compiling",
        "second:  38% loss 3",
    ]


def test_a_bar_of_each_stage_on_a_terminal(stderr):
    written = stderr(Terminal)
    two_stages()
    last = written.getvalue().split("a word")[-1]
    assert "first" in last and "100%" in last and "loss 40" in last
    assert "second" in last and "38%" in last and "\x1b[" in last


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_nothing_of_a_process_that_is_not_to_show(stderr, kind):
    written = stderr(kind)
    two_stages(shown=False)
    assert written.getvalue() == ""


def test_speed_is_of_this_call_alone():
    status = Status(8, 1, done=300, total=4000, resumed=100, seconds=2.0, program=None)
    assert describe(status) == "7 alive, 1 diverged, 100 steps/s, 0:00:37 left"


def test_what_an_earlier_call_has_done_is_said_first(stderr):
    written = stderr(io.StringIO)
    status = Status(8, 1, done=300, total=400, resumed=100, seconds=2.0, program=None)
    with Bar() as bar:
        bar.begin("sweep", 400)
        tell(bar, Path("out"), status)
        tell(bar, Path("out"), status._replace(done=400))
    said = written.getvalue().splitlines()
    assert said[1] == "going on from 100 of 400 steps in out" and len(said) == 4
