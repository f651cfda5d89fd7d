"""What is kept of every step, without a derivative more than the loop takes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rodjax.training._inputs import Given
from rodjax.training._quantities import MEMORY, TRACKED
from rodjax.training._trees import along, over

Values = dict[str, Array]


class Lengths(NamedTuple):
    """Of a step s: |s|^2, and g . s."""

    square: Float[Array, ""]
    slope: Float[Array, ""]


def lengths(given: Given, steps: PyTree, dtype: jnp.dtype) -> Lengths:
    """Both are dropped by the compiler where nothing uses them."""
    return Lengths(along(steps, steps, dtype), along(given.grad, steps, dtype))


def update_ratio(given: Given, size: Lengths) -> Float[Array, "2"]:
    """|s| / |w|."""
    params = along(given.params, given.params, size.square.dtype)
    return over(jnp.sqrt(size.square), jnp.sqrt(params))


def last_edge(numbers: Array, value: Array) -> Float[Array, "5"]:
    """With the last step's zeta, as the loss after it is known only now."""
    _, _, seen, before, slope = numbers
    there, gain = over(jnp.asarray(value, numbers.dtype) - before, slope)
    there = there * seen
    zeta = jnp.where(there > 0, 1 - gain, 0)
    return numbers.at[:2].set(jnp.stack([there, zeta]))


def this_step(numbers: Array, value: Array, size: Lengths) -> Float[Array, "5"]:
    """With what the next zeta takes of this step."""
    value = jnp.asarray(value, numbers.dtype)
    return numbers.at[2:].set(jnp.stack([jnp.ones_like(value), value, size.slope]))


def oscillation(
    numbers: Array, step: Array, directions: dict[str, PyTree], steps: PyTree
) -> Float[Array, "5"]:
    """Averages of (-1)^t a, a^2, |s|^2, with a the step along the tracked direction."""
    dtype = numbers.dtype
    direction = next(directions[name] for name in TRACKED if name in directions)
    part, square = along(direction, steps, dtype), along(steps, steps, dtype)
    sign = 1 - 2 * (step % 2).astype(dtype)
    new = jnp.stack([jnp.ones((), dtype), sign * part, part**2, square])
    averages = MEMORY * numbers[:4] + (1 - MEMORY) * new
    spread = MEMORY**2 * numbers[4] + (1 - MEMORY) ** 2
    averages = jnp.append(averages, spread)
    # One step that is not finite would be remembered for good.
    return jnp.where(jnp.isfinite(square), averages, numbers)


def turned(numbers: Array, overlap: Array) -> Float[Array, "5"]:
    """After the tracked direction turned: what it shares with the old one is left."""
    one = jnp.ones_like(overlap)
    return numbers * jnp.stack([one, overlap, overlap**2, one, one])


def alternation(
    step: Array, steps: PyTree, last: PyTree, before: PyTree, dtype: jnp.dtype
) -> Float[Array, "2"]:
    """|u - 2 u' + u''| / 8 over |u|, of three updates in a row."""
    bend = jax.tree.map(lambda u, v, w: u - 2 * v + w, steps, last, before)
    size = jnp.sqrt(along(steps, steps, dtype))
    found = over(jnp.sqrt(along(bend, bend, dtype)) / 8, size)
    return jnp.where(step >= 2, found, 0)
