"""What tells one program from another, and its data from other data."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

#: Arrays of up to so many numbers are written out: the settings of an operation are.
WRITTEN = 16


class Digests(NamedTuple):
    """Equal in any process for the same computation.

    - `program`: of all operations, their shapes and the few numbers in them.
    - `data`: of the arrays that the traced functions close over.
    """

    program: str
    data: str


def text_of(lowered: jax.stages.Lowered) -> str:
    """The program as text, with only the shapes of all but the smallest arrays."""
    module: Any = lowered.compiler_ir("stablehlo")
    return module.operation.get_asm(
        large_elements_limit=WRITTEN, enable_debug_info=False
    )


def digests(traced: jax.stages.Traced, text: str) -> Digests:
    """Those of a traced function, `text` being its program."""
    data = hashlib.sha256()
    for value in _arrays(traced.jaxpr.jaxpr, traced.jaxpr.consts):
        plain = jax.random.key_data(value) if _is_key(value) else value
        array = np.ascontiguousarray(plain)
        data.update(f"{array.dtype}{array.shape}".encode())
        # In place: the data may be as large as half of the memory.
        data.update(array.reshape(-1).view(np.uint8).data)
    return Digests(hashlib.sha256(text.encode()).hexdigest(), data.hexdigest())


def _arrays(jaxpr: Jaxpr, constants: Sequence[Any]) -> Iterator[Any]:
    """The arrays in a program, in the order of its operations."""
    yield from filter(_is_data, constants)
    for equation in jaxpr.eqns:
        # Where JAX is told to leave constants where they are used.
        literals = (x.val for x in equation.invars if isinstance(x, Literal))
        yield from filter(_is_data, literals)
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(part, ClosedJaxpr):
                yield from _arrays(part.jaxpr, part.consts)
            elif isinstance(part, Jaxpr):
                yield from _arrays(part, ())


def _is_data(value: Any) -> bool:
    """Whether it is more than the one number that the program's text has."""
    return bool(np.shape(value)) or _is_key(value)


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _is_jaxpr(part: Any) -> bool:
    return isinstance(part, ClosedJaxpr | Jaxpr)
