"""`rodjax list`: what the commands can name."""

import textwrap

from rodjax.cli import _names as choices
from rodjax.cli import _own as own

WIDTH = 88
OWN = f"your own: {own.WANTED}, or a function that returns it", "likewise, of a module"


def listing() -> None:
    """Print the problems, optimizers and flows, with a line on each."""
    ranked = ", ".join(name for name, record in choices.FLOWS.items() if record.rank)
    tables = {
        "Problems (--problem)": {k: c.line for k, c in choices.PROBLEMS.items()}
        | dict(zip(own.FORMS, OWN, strict=True)),
        "Optimizers (--optimizer), or any other of Optax": {
            k: c.line for k, c in choices.OPTIMIZERS.items()
        },
        f"Flows (--flows), with NAME:RANK for {ranked}": {
            k: r.models.replace("`", "") for k, r in choices.FLOWS.items()
        },
    }
    width = max(len(name) for table in tables.values() for name in table)
    for title, table in tables.items():
        print(f"{title}:")
        for name, line in table.items():
            first, later = f"  {name:{width}}  ", " " * (width + 4)
            print(
                textwrap.fill(
                    line, WIDTH, initial_indent=first, subsequent_indent=later
                )
            )
        print()
