"""The rooms of the package: who may import whom, and what each shows to the others."""

import ast
import importlib
from pathlib import Path

import pytest

import rodjax as rj

HOUSE = Path(rj.__file__).parent
#: From the ground up: a room imports itself and rooms before it.
ROOMS = (
    "linalg",
    "optimizer",
    "curvature",
    "flows",
    "solve",
    "training",
    "sweeps",
    "transforms",
    "problems",
    "report",
    "cli",
)
MODULES = {
    str(file.relative_to(HOUSE)): file
    for room in ROOMS
    for file in sorted((HOUSE / room).rglob("*.py"))
}


def imported(file):
    """The modules of rodjax that a file imports, wherever in it, and the line."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            module = node.module or ""
            # What comes from the top, or from a room, may be a module itself.
            if module == "rodjax" or module in {f"rodjax.{room}" for room in ROOMS}:
                found += [(f"{module}.{name.name}", node.lineno) for name in node.names]
            else:
                found.append((module, node.lineno))
        elif isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
    return [(m.split("."), n) for m, n in found if m.split(".")[0] == "rodjax"]


def faults(file, room):
    """What a file of a room imports and must not."""
    for path, line in imported(file):
        other, *inside = path[1:]
        if other not in ROOMS:
            yield f"line {line}: {'.'.join(path)} is no room"
        elif ROOMS.index(other) > ROOMS.index(room):
            yield f"line {line}: {other} stands above {room}"
        elif other != room and inside and inside[0].startswith("_"):
            yield f"line {line}: {'.'.join(path)} is {other}'s own: import from {other}"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_own_room_and_those_below(name):
    assert not list(faults(MODULES[name], name.split("/")[0]))


def test_an_import_of_a_room_above_is_found(tmp_path):
    file = tmp_path / "_module.py"
    file.write_text(
        "from rodjax.linalg import cubature\n"
        "from rodjax import report\n"
        "def late():\n"
        "    from rodjax.solve import compare\n"
        "    from rodjax.optimizer._window import Window\n"
        "    from rodjax.flows import _rod\n"
        "    import rodjax.choices\n"
    )
    lines = [fault.split(":")[0] for fault in faults(file, "flows")]
    assert lines == ["line 2", "line 4", "line 5", "line 7"]


def test_the_house_has_these_rooms():
    folders = {path.name for path in HOUSE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ROOMS)
    assert [path.name for path in HOUSE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_knows_and_shows_no_modules(room):
    module = importlib.import_module(f"rodjax.{room}")
    said = " ".join(module.__doc__.split())
    assert "Knows: " in said and "Must not know: " in said
    for name in module.__all__:
        shown = getattr(module, name)
        # So that no function hides a module, nor a module a function.
        assert type(shown).__name__ != "module", name
    for file in (HOUSE / room).glob("*.py"):
        assert file.stem.startswith("_"), f"{file.name}: begin it with an underscore"


def test_all_that_is_shown_exists():
    for name in rj.__all__:
        assert hasattr(rj, name), name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_enough_to_read(name):
    assert len(MODULES[name].read_text().splitlines()) <= 310
