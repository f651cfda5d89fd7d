"""What is derived from the registry of flows and cannot be made when it is read."""

from pathlib import Path

import rodjax as rj

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_has_the_table_of_flows():
    """To regenerate it: python -c "import rodjax as rj; print(rj.flows.table())"."""
    text = README.read_text(encoding="utf-8")
    first = rj.flows.table().splitlines()[0]
    assert text.count(first) == 1, "README.md has no table of flows, or two"
    found = text[text.index(first) :].split("\n\n")[0]
    assert found == rj.flows.table(), "README.md: replace the table of flows by " + (
        'that of python -c "import rodjax as rj; print(rj.flows.table())"'
    )


def test_the_flows_are_those_of_the_room():
    assert {record.build for record in rj.flows.REGISTRY.values()} == {
        getattr(rj.flows, name) for name in rj.flows.REGISTRY
    }
