"""Vectors that are pytrees: no leaf changes its shape, nor where it lies on devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """The inner product, as a sum over leaves."""
    parts = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def unit(tree: PyTree) -> PyTree:
    """Of unit length, whatever its scale; as it is where it is zero."""
    return over(tree, norm(tree))


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm, where squares would over- or underflow too."""
    largest = lambda x: jnp.max(jnp.abs(x), initial=0.0)
    size = jnp.max(jnp.stack([largest(x) for x in jax.tree.leaves(tree)]))
    scaled = over(tree, size)
    return size * jnp.sqrt(dot(scaled, scaled))


def over(tree: PyTree, size: Array) -> PyTree:
    """At 1 / size of it; as it is where that is zero."""
    safe = jnp.where(size > 0, size, 1)
    return jax.tree.map(lambda x: x / safe.astype(x.dtype), tree)


def random_direction(key: Array, like: PyTree) -> PyTree:
    """Numbers of mean zero and variance one, each leaf in the sharding of its like.

    Uniform ones, of `scattered`, which is quick to compile and takes no memory. They
    depend on the key and on the shapes, not on the devices.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from rodjax.linalg import random_direction
    >>> drawn = random_direction(jax.random.key(0), {"w": jnp.zeros((2, 3))})
    >>> drawn["w"].shape
    (2, 3)

    ```
    """
    return alike(scattered(like, jax.random.bits(key, dtype=jnp.uint32)), like)


def alike(tree: PyTree, like: PyTree) -> PyTree:
    """`tree`, to be laid out over devices as the floats `like` are.

    By a choice between numbers that is always the same: the compiler, which need not
    know, lays out what meets in an elementwise operation alike.
    """
    never = lambda x: (x != x) & jnp.isfinite(x)
    return jax.tree.map(lambda x, y: jnp.where(never(y), 0, x), tree, like)


def rows_like(tree: PyTree, k: int) -> PyTree:
    """Like k vectors, to be laid out over devices as `tree` is.

    Zeros, but for the first, into whose place `tree` is put: there the compiler follows
    a layout before it asks what is made of it; to what is broadcast it does so last.
    """

    def one(x: Array) -> Array:
        x = jnp.asarray(x)
        none = jnp.zeros((k, *x.shape), x.dtype)
        return jax.lax.dynamic_update_index_in_dim(none, x, 0, 0)

    return jax.tree.map(one, tree)


def scattered(like: PyTree, seed: int | Array) -> PyTree:
    """Numbers that look random, of mean zero and variance one, where there is no room.

    A hash of the indices of every entry (the finalizer of MurmurHash3): what a
    generator holds several arrays for is here computed where it is used.

    ```python
    >>> import jax.numpy as jnp
    >>> from rodjax.linalg import scattered
    >>> drawn = scattered({"w": jnp.zeros((100, 100))}, seed=0)["w"]
    >>> bool(abs(drawn.mean()) < 0.02), bool(abs(drawn.var() - 1) < 0.02)
    (True, True)

    ```
    """
    leaves, structure = jax.tree.flatten(like)

    def one(number: int, x: Array) -> Array:
        mixed = jnp.full(x.shape, number, jnp.uint32) + jnp.asarray(seed, jnp.uint32)
        for axis in range(x.ndim):
            mixed *= jnp.uint32(0x9E3779B1)
            mixed ^= jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            for shift, by in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
                mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(by)
            mixed ^= mixed >> 16
        # Uniform, from the 24 bits that single precision holds.
        return 3**0.5 * ((mixed >> 8).astype(x.dtype) / 2**23 - 1)

    return structure.unflatten([one(1000 * i, x) for i, x in enumerate(leaves)])
