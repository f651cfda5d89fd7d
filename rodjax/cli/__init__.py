"""The command line: an optimizer beside its flows, once or on a whole grid.

Knows: all other rooms, the names by which problems, optimizers, flows and solvers are
called, options, files and progress. Must not know: any mathematics, which it calls.
"""

import gc
from typing import Annotated

import typer

from rodjax.cli._cache import use_cache
from rodjax.cli._inspect import inspect
from rodjax.cli._list import listing
from rodjax.cli._run import run
from rodjax.cli._sweep import sweep
from rodjax.cli._view import view

__all__ = ["app", "main"]

#: Objects before Python looks for garbage, and how often it looks among older ones.
GARBAGE = 100_000, 50, 100

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(run)
app.command()(sweep)
app.command()(inspect)
app.command()(view)
app.command("list")(listing)


@app.callback()
def about(
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Keep compiled programs in $XDG_CACHE_HOME/rodjax (~/.cache/rodjax).",
        ),
    ] = True,
) -> None:
    """Continuous-time models of optimizers at the edge of stability."""
    if cache:
        use_cache()


def main() -> None:
    """Entry point of the command `rodjax`."""
    # What tracing makes by the million lives as long as the command does.
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    app()
