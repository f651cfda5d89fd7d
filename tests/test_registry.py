"""What must be as the registry of flows: the README's list, the commands' names."""

import re
from pathlib import Path

import rodjax as rj
from rodjax.cli._names import FLOWS

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_has_all_flows_in_order():
    text = README.read_text().partition("\n## The flows\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(rj.flows.REGISTRY)


def test_every_flow_of_the_room_has_a_record_of_its_name():
    for name, record in rj.flows.REGISTRY.items():
        assert record.name == name and record.build is getattr(rj.flows, name)
        assert FLOWS[name.replace("_", "-")] is record
