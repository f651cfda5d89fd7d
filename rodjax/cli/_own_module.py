"""The module in which a user's own problem is, and where in it something failed."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax


class Source(NamedTuple):
    """A user's module.

    - `shown`: how the user has named it.
    - `module`: the module itself.
    - `root`: the folder that it is in, with what it imports from beside it.
    """

    shown: str
    module: ModuleType
    root: Path


def of_file(text: str) -> Source:
    """A file, run as Python runs a script: what is in its folder can be imported.

    **Raises** `ValueError`, in one line, where there is no such file or it fails.
    """
    path = Path(text).expanduser()
    if path.suffix != ".py":
        raise ValueError(f"{text} is no Python file, whose name ends in .py")
    if not path.is_file():
        raise ValueError(f"there is no file {text}")
    path = path.resolve()
    _look_in(path.parent)
    # Not the file's bare name, which may be that of a library too.
    module = ModuleType(f"problem_in_{path.stem}")
    module.__file__, module.__package__ = str(path), ""
    # Where dataclasses look up what annotations mean.
    sys.modules[module.__name__] = module
    with blaming(f"{text} cannot be imported", path.parent):
        # Not by a loader, which may take a file changed within a second for the old.
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    return Source(text, module, path.parent)


def of_module(name: str) -> Source:
    """A module by its dotted name, of the current folder or installed.

    **Raises** `ValueError`, in one line, where there is no such module or it fails.
    """
    _look_in(here := Path.cwd())
    missing = f"there is no module {name}, neither in the current folder nor installed"
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{name!r} is neither a file that ends in .py nor a module")
    try:
        found = importlib.util.find_spec(parts[0])
    except ValueError:
        found = None
    if found is None:
        raise ValueError(missing)
    inside = list(found.submodule_search_locations or [])
    home = Path(inside[0] if inside else found.origin or "").resolve()
    installed = "site-packages" in home.parts or not home.is_relative_to(here)
    root = home if installed else here
    with blaming(f"{name} cannot be imported", root):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # It may be another that the module itself imports.
            if not (error.name and f"{name}.".startswith(f"{error.name}.")):
                raise
            module = None
    if module is None:
        raise ValueError(missing)
    return Source(name, module, root)


@contextmanager
def blaming(what: str, root: Path) -> Iterator[None]:
    """Say what failed and where in the user's files, in one line, as a `ValueError`."""
    try:
        yield
    # A script may end itself.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{what}: {_told(error, root)}") from None


def _told(error: BaseException, root: Path) -> str:
    """FILE:LINE: the error's type and its first line."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        place, said = (error.filename, error.lineno), f"SyntaxError: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames]
        own = [place for place in places if _is_own(Path(place[0]), root)]
        place = own[-1] if own else None
    if isinstance(error, jax.errors.JAXTypeError):
        said += " (it must be written in jax.numpy, to be compiled)"
    if isinstance(error, ImportError) and "relative import" in said:
        said += " (name it as package.module:NAME, from the folder above the package)"
    return f"{_short(Path(place[0]))}:{place[1]}: {said}" if place else said


def _is_own(file: Path, root: Path) -> bool:
    """Whether it is the user's, not a library in an environment below `root`."""
    if not file.is_relative_to(root):
        return False
    return "site-packages" not in file.relative_to(root).parts


def _short(file: Path) -> Path:
    return file.relative_to(here) if file.is_relative_to(here := Path.cwd()) else file


def _look_in(folder: Path) -> None:
    """Import from a folder first, as Python does from that of a script."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
