"""When two functions are the same, so that rebuilding one costs no compilation."""

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from rodjax.optimizer._precision import precise

F = TypeVar("F", bound=Callable[..., Any])

# Programs that a compiled function keeps.
PROGRAMS = 64
# What this module wraps for type checks is the function that it wraps.
CHECKING = "jaxtyping._decorator"
VALUES = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)


class _Itself:
    """An object that is equal to itself alone; holding it keeps its identity taken."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def fingerprint(thing: Any) -> Hashable:
    """What a function, or a tuple of functions, is made of; equal if it is the same.

    Two functions are the same if the same lines of code made them of the same values:
    what they close over, their defaults, and the globals that they name, looked into
    as deep as functions and containers go. Numbers and strings are compared by value,
    all else (arrays, modules, objects) by identity. What a function would find changed
    since, in a list or a module, it is not asked about, as `jax.jit` does not either.
    """
    return _Prints().of(thing)


class _Prints:
    """One look at something, in which everything is looked into once."""

    def __init__(self):
        self.met: dict[int, int] = {}
        self.kept: list[Any] = []
        self.traced = False

    def of(self, thing: Any) -> Hashable:
        if isinstance(thing, VALUES):
            # By what it prints, for NaN is not equal to itself, and 1 is to True.
            return type(thing), repr(thing)
        if id(thing) in self.met:
            return "met", self.met[id(thing)]
        self.met[id(thing)] = len(self.met)
        # As long as this lasts no other object may get the same identity.
        self.kept.append(thing)
        self.traced |= isinstance(thing, Tracer)
        if isinstance(thing, jax.tree_util.PyTreeDef):
            return thing
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, types.MethodType):
            return types.MethodType, self.of(thing.__func__), self.of(thing.__self__)
        if isinstance(thing, functools.partial):
            parts = thing.func, thing.args, thing.keywords
            return type(thing), *map(self.of, parts)
        if isinstance(thing, tuple | list):
            return type(thing), *map(self.of, thing)
        if isinstance(thing, Mapping):
            pairs = ((self.of(key), self.of(value)) for key, value in thing.items())
            return type(thing), *pairs
        if dataclasses.is_dataclass(thing) and not isinstance(thing, type | eqx.Module):
            fields = (getattr(thing, f.name) for f in dataclasses.fields(thing))
            return type(thing), *map(self.of, fields)
        return _Itself(thing)

    def _function(self, function: types.FunctionType) -> Hashable:
        if function.__globals__.get("__name__") == CHECKING:
            return self.of(getattr(function, "__wrapped__", None))
        cells = function.__closure__ or ()
        scope = function.__globals__
        seen: list[Hashable] = [_Itself(function.__code__), _Itself(scope)]
        for cell in cells:
            try:
                seen.append(self.of(cell.cell_contents))
            except ValueError:  # A cell that nothing has been put into yet.
                seen.append(None)
        seen += map(self.of, (function.__defaults__, function.__kwdefaults__))
        for name in _names(function.__code__):
            value = scope.get(name)
            # Its own module's functions may read other globals in turn.
            near = isinstance(value, types.FunctionType) and value.__globals__ is scope
            plain = near or isinstance(value, VALUES)
            seen.append((name, self.of(value) if plain else _Itself(value)))
        return types.FunctionType, *seen


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that a function may read, those inside it included."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(
        dict.fromkeys([*code.co_names, *(n for c in inner for n in _names(c))])
    )


class Same:
    """Anything, equal to whatever has the same `fingerprint`.

    `traced`: whether it closes over what is being traced, and must not outlive that.
    """

    def __init__(self, thing: Any):
        self.thing = thing
        prints = _Prints()
        self.print = prints.of(thing)
        self.traced = prints.traced
        self.hash = hash(self.print)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.print == other.print

    def __hash__(self) -> int:
        return self.hash


def compiled(function: F) -> F:
    """`jax.jit` of a function of pytrees in which functions are static.

    Arrays are traced; all other leaves are compile-time constants that are compared by
    their `fingerprint`: a flow, metric or optimizer that is built again from the same
    parts shares the compilation of the first. The last 64 such constants of a function
    are kept, each with the data that it closes over; a function that closes over what
    is being traced is neither compiled nor kept. Products are those of `precise`.
    Positional arguments only.

    ```python
    >>> import jax, jax.numpy as jnp, rodjax as rj
    >>> traces = []
    >>> @rj.optimizer.compiled
    ... def apply(f, x):
    ...     traces.append(1)
    ...     return f(x)
    >>> scale = lambda by: lambda x: by * x
    >>> float(apply(scale(2.0), jnp.ones(()))), float(apply(scale(2.0), jnp.ones(())))
    (2.0, 2.0)
    >>> len(traces)
    1

    ```
    """

    # An argument that is static to JAX would be kept for as long as the process lives.
    @functools.lru_cache(maxsize=PROGRAMS)
    def program(static: Same) -> Any:
        structure, leaves = static.thing
        rest = jax.tree.unflatten(structure, leaves)
        return jax.jit(lambda arrays: function(*eqx.combine(arrays, rest)))

    @precise
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        arrays, rest = eqx.partition(args, eqx.is_array)
        leaves, structure = jax.tree.flatten(rest)
        same = Same((structure, leaves))
        return function(*args) if same.traced else program(same)(arrays)

    return cast(F, call)
