"""What is made from the registry of flows: the README's table, the commands' names."""

from pathlib import Path

import rodjax as rj
from rodjax.cli._names import FLOWS

README = Path(__file__).parents[1] / "README.md"


def test_the_table_in_the_readme_is_the_registrys():
    lines = README.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| flow | what"))
    stop = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    # To write it anew: python -c "import rodjax as rj; print(rj.flows.table())"
    assert "\n".join(lines[first:stop]) == rj.flows.table()


def test_every_flow_of_the_room_has_a_record_of_its_name():
    for name, record in rj.flows.REGISTRY.items():
        assert record.name == name and record.build is getattr(rj.flows, name)
        assert FLOWS[name.replace("_", "-")] is record
