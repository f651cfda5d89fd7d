"""`rodjax list`: what the commands can name."""

from rodjax.cli import _names as choices


def listing() -> None:
    """Print the problems, optimizers and flows, with a line on each."""
    tables = {
        "Problems (--problem)": {k: c.line for k, c in choices.PROBLEMS.items()},
        "Optimizers (--optimizer), or any other of Optax": {
            k: c.line for k, c in choices.OPTIMIZERS.items()
        },
        "Flows (--flows)": {k: r.models for k, r in choices.FLOWS.items()},
    }
    width = max(len(name) for table in tables.values() for name in table)
    for title, table in tables.items():
        print(f"{title}:")
        for name, line in table.items():
            print(f"  {name:{width}}  {line}")
        print()
