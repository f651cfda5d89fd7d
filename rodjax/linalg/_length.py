"""Roots and lengths that have a derivative at zero, where oscillations begin."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree


def square_root(square: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The square root, whose derivative at zero is zero.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from rodjax.linalg import square_root
    >>> [float(jax.grad(square_root)(x)) for x in jnp.array([0.0, 4.0])]
    [0.0, 0.25]

    ```
    """
    # What is not a number stays so.
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def length(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of a pytree, whose derivative at zero is zero.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from rodjax.linalg import length
    >>> float(length([jnp.array(3.0), jnp.array([0.0, 4.0])]))
    5.0
    >>> jax.grad(length)(jnp.zeros(2)).tolist()
    [0.0, 0.0]

    ```
    """
    return square_root(optax.tree.norm(tree, squared=True))
