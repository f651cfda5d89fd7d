"""A small vision transformer in Flax."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rodjax.problems._base import Data, Problem
from rodjax.problems._checks import check_counts
from rodjax.problems._supervised import Loss, image_shape, supervised
from rodjax.problems._transformer import Transformer, check_sizes, initializer


class ViT(nnx.Module):
    """A transformer on the patches of an image, averaged over them."""

    def __init__(
        self,
        patch: int,
        image: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        height, across, given = image
        common = {"kernel_init": initializer(), "dtype": dtype, "param_dtype": dtype}
        self.patch = patch
        self.embed = nnx.Linear(patch * patch * given, width, rngs=rngs, **common)
        self.transformer = Transformer(
            (height // patch) * (across // patch),
            width=width,
            depth=depth,
            heads=heads,
            dtype=dtype,
            rngs=rngs,
        )
        self.head = nnx.Linear(width, classes, rngs=rngs, **common)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        n, height, across, given = x.shape
        p = self.patch
        x = jnp.reshape(x, (n, height // p, p, across // p, p, given))
        patches = jnp.reshape(jnp.moveaxis(x, 3, 2), (n, -1, p * p * given))
        return self.head(jnp.mean(self.transformer(self.embed(patches)), axis=1))


def vit(
    data: Data,
    *,
    patch: int = 4,
    width: int = 16,
    depth: int = 2,
    heads: int = 2,
    loss: Loss = "mse",
    seed: int = 0,
    chunk: int | None = None,
) -> Problem:
    """A vision transformer on images.

    Patches are embedded linearly, with learned positions; pre-norm blocks of attention
    and a GELU layer of twice the width follow; their outputs, normalized, are averaged
    over the patches and read out linearly. Weights start as `N(0, 1 / fan_in)`,
    biases at zero.

    **Arguments**

    - `data`: inputs [n, height, width, channels], targets [n, classes]; their dtype is
      that of the parameters.
    - `patch`: side of a patch, which divides height and width.
    - `width`: of the embedding, a multiple of `heads`.
    - `depth`: number of blocks.
    - `heads`: of the attention.
    - `loss`: `"mse"` or `"cross-entropy"`, see `supervised`.
    - `seed`: draws the weights.
    - `chunk`: samples at a time, see `chunked_mean`.

    **Returns** the problem; its parameters are the nested dict of `params["embed"]`,
    `params["transformer"]` and `params["head"]`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices, or
    the inputs are no images.

    Source: Dosovitskiy et al., ICLR 2021, arXiv 2010.11929; trained full-batch in Cohen
    et al., ICLR 2025, arXiv 2410.24206.

    ```python
    >>> import rodjax as rj
    >>> problem = rj.problems.vit(rj.problems.digits(20), width=8, depth=1)
    >>> problem.params["embed"]["kernel"].shape
    (16, 8)

    ```
    """
    check_counts(patch=[patch])
    check_sizes(width, depth, heads)
    image, classes = image_shape(data), data.targets.shape[-1]
    if image[0] % patch or image[1] % patch:
        raise ValueError(
            f"patch={patch} must divide the images' {image[0]} x {image[1]} pixels."
        )

    def build(key: Array) -> nnx.Module:
        return ViT(
            patch,
            image,
            classes,
            width=width,
            depth=depth,
            heads=heads,
            dtype=data.targets.dtype,
            rngs=nnx.Rngs(key),
        )

    return supervised(build, data, loss=loss, seed=seed, chunk=chunk, name="vit")
