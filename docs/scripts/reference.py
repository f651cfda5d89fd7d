"""The pages of the reference: every public name by room, and the command line."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType

import typer
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: From the ground up, as in tests/test_house.py.
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
)
#: Characters of a value that is shown.
LONGEST = 100
#: Rooms whose names are all for users; of the others those that `rodjax` itself shows.
OPEN = ("flows", "training", "transforms", "problems")


def on_files(files, *, config):
    """Adds a page for every room, one for the top of the package, the commands'."""
    pages = {f"{room}.md": room_page(room) for room in ROOMS}
    pages |= {"rodjax.md": top_page(), "cli.md": command_page()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def said_of(module: str) -> str:
    """The docstring of a room."""
    file = ROOT / "rodjax" / module / "__init__.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def names_of(room: str) -> list[str]:
    """What a room shows, functions before types before constants."""
    module = importlib.import_module(f"rodjax.{room}")

    def kind(name: str) -> int:
        shown = getattr(module, name)
        return 1 if isinstance(shown, type) else 0 if inspect.isroutine(shown) else 2

    return sorted(module.__all__, key=lambda name: (kind(name), name.lower()))


def documented(shown: object) -> bool:
    """Whether it has a docstring of its own, as functions and classes have."""
    return isinstance(shown, type) or inspect.isroutine(shown)


def constant(room: str, name: str) -> list[str]:
    """A constant or an alias of types: its value if short, and its comment."""
    shown = getattr(importlib.import_module(f"rodjax.{room}"), name)
    value = repr(shown)
    comment = re.compile(rf"((?:^#:? .*\n)+)(?=[\w, ]*\b{name}\b[^(\n]*=)", re.M)
    said = ""
    for file in sorted((ROOT / "rodjax" / room).glob("_*.py")):
        if found := comment.search(file.read_text(encoding="utf-8")):
            said = re.sub(r"^#:? ", "", found[1], flags=re.M)
    lines = [f"### `{name}` {{ #rodjax.{room}.{name} }}", "", said, ""]
    return [*lines, f"`{value}`", ""] if len(value) <= LONGEST else lines


def room_page(room: str) -> str:
    """Every public name of a room, those for users first."""
    top = importlib.import_module("rodjax").__all__
    names = names_of(room)
    users = [name for name in names if room in OPEN or name in top]
    others = [name for name in names if name not in users]
    lines = [f"# {room}", "", said_of(room), ""]
    lines += _entries(room, users)
    if others:
        lines += [
            "## Shared between rooms",
            "",
            "What other rooms of rodjax take from this one; of use to whoever extends "
            "the library.",
            "",
            *_entries(room, others),
        ]
    return "\n".join(lines)


def _entries(room: str, names: list[str]) -> list[str]:
    module = importlib.import_module(f"rodjax.{room}")
    lines = []
    for name in names:
        shown = getattr(module, name)
        entry = [f"::: rodjax.{room}.{name}", *_methods(shown), ""]
        lines += entry if documented(shown) else constant(room, name)
    return lines


def _methods(shown: object) -> list[str]:
    """Asks for the methods of a class; its fields are in its docstring."""
    kinds = (FunctionType, classmethod, staticmethod, property)
    found = [
        name
        for name, value in (vars(shown) if isinstance(shown, type) else {}).items()
        if isinstance(value, kinds) and not name.startswith("_")
    ]
    fields = getattr(shown, "__annotations__", {})
    found = [name for name in found if name not in fields]
    return ["    options:", f"      members: {found}"] if found else []


def top_page() -> str:
    """Where the names are that `import rodjax as rj` shows."""
    top = importlib.import_module("rodjax")
    lines = [
        "# rodjax",
        "",
        "`import rodjax as rj` shows the names below, and the rooms as `rj.flows`, "
        "`rj.training` and so on. It loads neither Flax nor xarray, matplotlib or "
        "orbax before they are needed.",
        "",
        "| name | what it is | room |",
        "|---|---|---|",
    ]
    homes = {name: room for room in reversed(ROOMS) for name in names_of(room)}
    for name in sorted(top.__all__, key=str.lower):
        if name in ROOMS:
            continue
        room = homes[name]
        first = _first_sentence(getattr(top, name))
        lines.append(
            f"| [`rj.{name}`][rodjax.{room}.{name}] | {first} | [{room}]({room}.md) |"
        )
    return "\n".join(lines)


def _first_sentence(thing: object) -> str:
    text = (thing.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


def command_page() -> str:
    """The commands and their options, as typer has them."""
    app = importlib.import_module("rodjax.cli").app
    group = typer.main.get_command(app)
    lines = ["# The command line", "", said_of("cli"), ""]
    lines += ["[How to use it](../how-to/command-line.md) has examples.", ""]
    for name, command in group.commands.items():
        lines += [f"## rodjax {name}", "", command.help or "", ""]
        if command.params:
            lines += ["| option | default | meaning |", "|---|---|---|"]
            lines += [_option(parameter) for parameter in command.params]
            lines.append("")
    return "\n".join(lines)


def _option(parameter) -> str:
    names = [f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts]]
    if parameter.param_type_name == "argument":
        names = [f"`{parameter.name.upper()}`"]
    default = parameter.default
    shown = "required" if parameter.required else ""
    if default not in (None, "", ()) and not parameter.required:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    several = " Repeatable." if parameter.multiple else ""
    meaning = f"{parameter.help or ''}{several}".replace("|", "\\|")
    return f"| {', '.join(names)} | {shown} | {meaning} |"
