"""NAME=VALUE as the keyword arguments of a user's function, checked against it."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rodjax.cli import _names as choices

FLAG = "--problem-set"
_KEYWORDS = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
# A value that is not of the type asked for.
_UNFIT = object()


def arguments(
    shown: str, function: Callable[..., Any], settings: Sequence[str], dtype: str | None
) -> dict[str, Any]:
    """The keyword arguments that `settings`, each NAME=VALUE, are to `function`.

    It gets `dtype` too if it takes one and none is set.

    **Raises** `ValueError` for a name that it does not take, a value of another type
    than its annotation says, and an argument that it needs and is not given.
    """
    known = _parameters(function)
    named = {k: p for k, p in known.items() if p.kind in _KEYWORDS}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    given: dict[str, Any] = {}
    for text in settings:
        name, value = choices.setting(text, FLAG, "n=200")
        if name in named:
            value = _converted(shown, text, value, named[name])
        elif not anything:
            takes = ", ".join(named) or "no arguments"
            raise ValueError(f"{FLAG} {name}=...: {shown} takes {takes}")
        given[name] = value
    if dtype is not None and "dtype" in named:
        given.setdefault("dtype", dtype)
    for name, parameter in known.items():
        packed = parameter.kind not in (*_KEYWORDS, inspect.Parameter.POSITIONAL_ONLY)
        if name in given or packed or parameter.default is not parameter.empty:
            continue
        if name not in named:
            raise ValueError(f"{shown} takes {name} by position: let it be a keyword")
        raise ValueError(
            f"{shown} needs {name}: give it {FLAG} {name}=..., or name a function that "
            "makes the problem"
        )
    return given


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        # Annotations may be strings, of names that do not exist at run time.
        return inspect.signature(function, eval_str=True).parameters
    except Exception:
        return inspect.signature(function).parameters


def _converted(shown: str, text: str, value: Any, parameter: inspect.Parameter) -> Any:
    """The value as the parameter's annotation, or else its default, has it."""
    raw, hint, default = text.partition("=")[2], parameter.annotation, parameter.default
    if hint is parameter.empty:
        if default is None or default is parameter.empty:
            return value
        # What a default is says what is meant, not what is allowed.
        found = _as(type(default), value, raw)
        return value if found is _UNFIT else found
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    # Any text is a string.
    for kind in sorted(kinds, key=lambda kind: kind in (str, Path)):
        if (found := _as(kind, value, raw)) is not _UNFIT:
            return found
    wanted = inspect.formatannotation(hint)
    raise ValueError(f"{FLAG} {text}: {shown} takes {parameter.name} as {wanted}")


def _as(kind: Any, value: Any, raw: str) -> Any:
    """The value as a type, if that is one that the command line can tell."""
    origin = typing.get_origin(kind) or kind
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is Literal:
        return next((x for x in typing.get_args(kind) if x in (value, raw)), _UNFIT)
    if origin is int:
        return int(value) if number and value == value // 1 else _UNFIT
    if origin is float:
        return float(value) if number else _UNFIT
    if origin in (str, Path):
        return origin(value if isinstance(value, str) else raw)
    if origin in (tuple, list):
        return origin(value) if isinstance(value, tuple | list) else _UNFIT
    if origin in (bool, dict, Sequence, type(None)):
        sort = (tuple, list) if origin is Sequence else origin
        return value if isinstance(value, sort) else _UNFIT
    return value
