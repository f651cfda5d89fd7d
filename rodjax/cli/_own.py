"""The user's own problem, by the file or the module that it is in."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rodjax.cli._own_arguments import FLAG, arguments
from rodjax.cli._own_checks import checked, named
from rodjax.cli._own_module import Source, blaming, of_file, of_module
from rodjax.problems import Problem

#: How it is named, and what stands there.
FORMS = "FILE.py:NAME", "package.module:NAME"
WANTED = "a rodjax.problems.Problem or the pair (loss, parameters)"
# Names listed at most.
LISTED = 20


def is_own(spec: str) -> bool:
    """Whether this names a user's problem, not one of the library."""
    return ":" in spec or os.sep in spec or spec.endswith(".py")


def load(spec: str, settings: Sequence[str] = (), dtype: str | None = None) -> Problem:
    """The problem that FILE.py:NAME or package.module:NAME stands for.

    NAME is a `Problem`, a pair (loss, parameters), or what returns either when called:
    a function, a class, a partial. The name of the problem is its own or else NAME. The
    file's folder, or the current one for a module, stays in `sys.path`, since a loss
    may import when it is traced.

    - `settings`: each NAME=VALUE, a keyword argument of the function.
    - `dtype`: given to a function that takes a `dtype`, unless it is set.

    **Raises** `ValueError`, in one line that names the option or the user's line, for
    whatever keeps the problem from being run.
    """
    try:
        source, name, found = find(spec)
        if isinstance(found, Problem) or not callable(found):
            made = _ready(name, found, settings)
        else:
            build: Callable[..., Any] = found
            given = arguments(name, build, settings, dtype)
            with blaming(f"{name}({_written(given)}) fails", source.root):
                made = build(**given)
            if not _is_problem(made):
                raise ValueError(
                    f"{name} returns {named(made)}, where {WANTED} is wanted"
                )
        problem = made if isinstance(made, Problem) else Problem(name, *made)
        return checked(problem._replace(name=str(problem.name or name)), source.root)
    except ValueError as error:
        # What is wrong with the settings begins with their option.
        said = str(error)
        raise ValueError(
            said if said.startswith(FLAG) else f"--problem {spec}: {said}"
        ) from None


def _ready(name: str, found: Any, settings: Sequence[str]) -> Any:
    """What is a problem as it stands, which nothing can be set of."""
    if not _is_problem(found):
        raise ValueError(
            f"{name} is {named(found)}, where {WANTED}, or a function that returns "
            "one, is wanted"
        )
    if settings:
        asked = settings[0].partition("=")[0]
        raise ValueError(
            f"{FLAG} {asked}=...: {name} is a problem as it stands; make it a function "
            f"of {asked} that returns one"
        )
    return found


def find(spec: str) -> tuple[Source, str, Any]:
    """The module, the name in it and what it stands for."""
    place, colon, name = spec.rpartition(":")
    if not colon or name.endswith(".py"):
        place, name = spec, ""
    is_file = place.endswith(".py") or os.sep in place or Path(place).is_file()
    source = of_file(place) if is_file else of_module(place)
    found: Any = source.module
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        fitting = _fitting(source.module)
        more = ", ..." if len(fitting) > LISTED else ""
        has = f"it has {', '.join(fitting[:LISTED])}{more}"
        missing = f"{place} has no {name}" if name else f"write {place}:NAME"
        none = "it has no Problem, and no function that could return one"
        raise ValueError(f"{missing}; {has if fitting else none}") from None
    return source, name, found


def _is_problem(found: Any) -> bool:
    pair = isinstance(found, tuple) and len(found) == 2 and callable(found[0])
    return isinstance(found, Problem) or pair


def _fitting(module: ModuleType) -> list[str]:
    """The names of a module that may stand for a problem."""

    def fits(value: Any) -> bool:
        if inspect.isclass(value) and not issubclass(value, tuple):
            return False
        if not callable(value) or isinstance(value, functools.partial):
            return _is_problem(value) or callable(value)
        # Not what it has imported from elsewhere.
        home = getattr(value, "__module__", None) or ""
        return f"{home}.".startswith(f"{module.__name__}.")

    names = [name for name in vars(module) if not name.startswith("_")]
    return [name for name in names if fits(getattr(module, name))]


def _written(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in given.items())
