"""The command line, called in this process."""

from contextlib import contextmanager

import jax
from typer.testing import CliRunner

from rodjax.cli import app


@contextmanager
def own_configuration():
    """The command configures its process; the tests share theirs."""
    saved = jax.config.jax_enable_x64
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", saved)


def invoke(*arguments):
    """What a command said, and how it ended."""
    with own_configuration():
        return CliRunner().invoke(app, [*map(str, arguments)])
