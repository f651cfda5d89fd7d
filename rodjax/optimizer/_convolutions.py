"""Convolutions that loops on a CPU run as fast as what stands outside of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from rodjax.optimizer._precision import precise

# What only wraps another program, and has no rule of differentiation of its own.
WRAPS, CHECKPOINTS = ("jit", "pjit", "closed_call"), ("checkpoint", "remat2")


def for_loops(function: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient that loops are fast at, in full precision (see `precise`).

    The function with its convolutions laid out as CPUs are fast at, in loops too; the
    same up to rounding. XLA lays out a convolution anew only where it stands
    outside of all loops and branches; within them, where flows and probes run, one
    with the axes that derivatives of a convolution have takes up to 200 times as long.
    So this goes around a gradient; what loops of the function's own hold, and other
    backends, are left as they are.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from rodjax.optimizer import for_loops
    >>> smooth = lambda w: jnp.sum(jnp.convolve(w, jnp.ones(3)) ** 2)
    >>> slope = for_loops(jax.grad(smooth))
    >>> slope(jnp.array([1.0, -1.0, 2.0])).tolist()
    [6.0, 6.0, 10.0]

    ```
    """

    @precise
    def laid_out(*arguments: Any) -> Any:
        if jax.default_backend() != "cpu":
            return function(*arguments)
        program, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        # The function itself is called once in any case.
        if _has_one(program.jaxpr):
            found = _evaluate(program.jaxpr, program.consts, leaves)
        else:
            found = core.jaxpr_as_fun(program)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return laid_out


def _is_one(equation: Any) -> bool:
    """Whether it is a convolution whose axes are in another order."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    given = tuple(map(tuple, equation.params["dimension_numbers"]))
    return given != tuple(map(tuple, _axes(equation.outvars[0].aval.ndim)))


def _axes(ndim: int) -> jax.lax.ConvDimensionNumbers:
    """Of [batch, ..., channel] and [..., channel, feature]."""
    batch, *between, last = range(ndim)
    ends = (batch, last, *between)
    return jax.lax.ConvDimensionNumbers(ends, (last, last - 1, *range(last - 1)), ends)


def _inside(equation: Any) -> Any:
    """The program that an equation only wraps, if it does."""
    wraps = equation.primitive.name in (*WRAPS, *CHECKPOINTS)
    return equation.params.get("jaxpr") if wraps else None


def _has_one(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        inside = _inside(equation)
        if _is_one(equation) or (inside is not None and _has_one(_open(inside))):
            return True
    return False


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _evaluate(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
    """The values of a program, its convolutions laid out."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, arguments, strict=True)
    read = lambda x: x.val if isinstance(x, core.Literal) else known[x]
    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        inside = _inside(equation)
        if _is_one(equation):
            outputs = [_laid_out(*inputs, **equation.params)]
        elif inside is not None and _has_one(_open(inside)):
            outputs = _wrapped(equation, inside)(*inputs)
        else:
            outputs = _alone(jaxpr, equation, inputs)
        known |= zip(equation.outvars, outputs, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _wrapped(equation: Any, inside: Any) -> Callable[..., list[Any]]:
    run = lambda *xs: _evaluate(_open(inside), getattr(inside, "consts", ()), xs)
    given = equation.params
    if equation.primitive.name not in CHECKPOINTS:
        return run
    return jax.checkpoint(run, policy=given["policy"], prevent_cse=given["prevent_cse"])


def _alone(around: Any, equation: Any, inputs: list[Any]) -> list[Any]:
    """The outputs of one equation, with its own rules of differentiation."""
    pairs = zip(equation.invars, inputs, strict=True)
    known = {x: value for x, value in pairs if not isinstance(x, core.Literal)}
    free, outputs = list(known), list(equation.outvars)
    jaxpr = around.replace(constvars=[], invars=free, outvars=outputs, eqns=[equation])
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*known.values())


def _laid_out(
    x: Array, kernel: Array, *, dimension_numbers: Any, **given: Any
) -> Array:
    """`jax.lax.conv_general_dilated`, by one with the axes in order."""
    lhs, rhs, out = dimension_numbers
    last = lambda spec: (spec[0], *spec[2:], spec[1])
    found = jax.lax.conv_general_dilated_p.bind(
        jnp.transpose(x, last(lhs)),
        jnp.transpose(kernel, (*rhs[2:], rhs[1], rhs[0])),
        dimension_numbers=_axes(x.ndim),
        **given,
    )
    back = [0] * x.ndim
    for place, axis in enumerate(last(out)):
        back[axis] = place
    return jnp.transpose(found, back)
