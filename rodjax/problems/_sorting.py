"""A sequence task that is not vision: a transformer that learns to sort."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rodjax.problems._base import Data, Problem, float_dtype
from rodjax.problems._checks import check_counts
from rodjax.problems._supervised import Loss, supervised
from rodjax.problems._transformer import Transformer, check_sizes, initializer


def sequences(
    n: int,
    *,
    length: int = 6,
    vocabulary: int = 6,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> Data:
    """Random sequences, and the same sorted.

    **Arguments**

    - `n`: number of sequences.
    - `length`: of each.
    - `vocabulary`: tokens are uniform on `0, ..., vocabulary - 1`.
    - `seed`: draws them.
    - `dtype`: of the targets; None for JAX's default float.

    **Returns** tokens [n, length], integers, and one-hot targets [n, length,
    vocabulary].

    **Raises** `ValueError` if a size is not a positive whole number, or `dtype` is
    unfit.

    Source: the synthetic sorting task of Cohen et al., ICLR 2025, arXiv 2410.24206
    (reconstructed).

    ```python
    >>> data = sequences(3, length=4, vocabulary=5)
    >>> first = data.inputs[0].tolist()
    >>> data.targets[0].argmax(-1).tolist() == sorted(first)
    True

    ```
    """
    dtype = float_dtype(dtype)
    check_counts(n=[n], length=[length], vocabulary=[vocabulary])
    tokens = jax.random.randint(jax.random.key(seed), (n, length), 0, vocabulary)
    return Data(tokens, jax.nn.one_hot(jnp.sort(tokens), vocabulary, dtype=dtype))


class Sorter(nnx.Module):
    """From tokens to a score of every token at every position."""

    def __init__(
        self,
        length: int,
        vocabulary: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(vocabulary, width, **kinds)
        self.transformer = Transformer(
            length, width=width, depth=depth, heads=heads, dtype=dtype, rngs=rngs
        )
        self.head = nnx.Linear(width, vocabulary, kernel_init=initializer(), **kinds)

    def __call__(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t vocabulary"]:
        return self.head(self.transformer(self.embed(tokens)))


def sorting(
    n: int = 50,
    *,
    length: int = 6,
    vocabulary: int = 6,
    width: int = 16,
    depth: int = 1,
    heads: int = 2,
    loss: Loss = "cross-entropy",
    seed: int = 0,
    chunk: int | None = None,
    dtype: DTypeLike | None = None,
) -> Problem:
    """A transformer that sorts `sequences`, all positions at once.

    Tokens are embedded, with learned positions; pre-norm blocks of attention and a GELU
    layer of twice the width follow, and a linear layer scores every token at every
    position. Weights start as `N(0, 1 / fan_in)`, biases at zero.

    **Arguments**

    - `n`: number of sequences.
    - `length`: of each.
    - `vocabulary`: number of tokens.
    - `width`: of the embedding, a multiple of `heads`.
    - `depth`: number of blocks.
    - `heads`: of the attention.
    - `loss`: `"cross-entropy"` or `"mse"`, see `supervised`.
    - `seed`: draws the sequences and the weights; `draw` draws weights only.
    - `chunk`: samples at a time, see `chunked_mean`.
    - `dtype`: of parameters and computation; None for JAX's default float.

    **Returns** the problem; its parameters are the nested dict of `params["embed"]`,
    `params["transformer"]` and `params["head"]`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices.

    Source: the sorting task of Cohen et al., ICLR 2025, arXiv 2410.24206
    (reconstructed); Vaswani et al., NeurIPS 2017, arXiv 1706.03762.

    ```python
    >>> problem = sorting(10, length=4, vocabulary=5, width=8)
    >>> problem.params["embed"]["embedding"].shape
    (5, 8)
    >>> bool(problem.metrics["accuracy"](problem.params) < 0.9)
    True

    ```
    """
    check_sizes(width, depth, heads)
    data = sequences(n, length=length, vocabulary=vocabulary, seed=seed, dtype=dtype)

    def build(key: Array) -> nnx.Module:
        return Sorter(
            length,
            vocabulary,
            width=width,
            depth=depth,
            heads=heads,
            dtype=data.targets.dtype,
            rngs=nnx.Rngs(key),
        )

    return supervised(build, data, loss=loss, seed=seed, chunk=chunk, name="sorting")
