"""The command line: an optimizer beside its flows, once or on a whole grid."""

import typer

from rodjax.cli.listing import listing
from rodjax.cli.run import run
from rodjax.cli.sweep import sweep

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(run)
app.command()(sweep)
app.command("list")(listing)


@app.callback()
def about() -> None:
    """Continuous-time models of optimizers at the edge of stability."""


def main() -> None:
    """Entry point of the command `rodjax`."""
    app()
