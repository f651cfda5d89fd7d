"""A small transformer encoder in Flax, shared by images and sequences."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rodjax.problems._checks import check_counts

EXPANSION = 2


def initializer() -> nnx.Initializer:
    """Of weights: `N(0, 1 / fan_in)`."""
    return nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


def check_sizes(width: int, depth: int, heads: int) -> None:
    """Raise `ValueError` for sizes that no transformer has."""
    check_counts(width=[width], depth=[depth], heads=[heads])
    if width % heads:
        raise ValueError(f"width={width} must be a multiple of heads={heads}.")


class Block(nnx.Module):
    """Attention, then two layers with a GELU between, both normalized first."""

    def __init__(self, width: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        weights: dict[str, Any] = kinds | {"kernel_init": initializer()}
        self.first, self.second = (nnx.LayerNorm(width, **kinds) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **weights)
        self.up = nnx.Linear(width, EXPANSION * width, **weights)
        self.down = nnx.Linear(EXPANSION * width, width, **weights)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        x = x + self.attention(self.first(x))
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class Transformer(nnx.Module):
    """Learned positions, then blocks, and a normalization at the end."""

    def __init__(
        self,
        length: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        start = nnx.initializers.normal(0.1)
        self.positions = nnx.Param(start(rngs.params(), (length, width), dtype))
        self.blocks = nnx.List(
            Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)
        )
        self.last = nnx.LayerNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        x = x + self.positions[...][None]
        for block in self.blocks:
            x = block(x)
        return self.last(x)
