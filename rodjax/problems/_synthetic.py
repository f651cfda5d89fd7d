"""Synthetic labelled samples: clusters about random points."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rodjax.problems._base import Data, float_dtype
from rodjax.problems._checks import check_counts


def clusters(
    n: int,
    *,
    shape: tuple[int, ...] = (8, 8, 1),
    classes: int = 10,
    noise: float = 2.0,
    seed: int = 0,
    dtype: DTypeLike | None = None,
) -> Data:
    r"""Samples scattered about one random point for each class.

    Inputs are $(m + \nu e) / \sqrt{1 + \nu^2}$, less their mean, with standard normal
    centres m and noise e, $\nu$ the `noise`: entries of variance one. Classes take
    turns. Where the noise is larger than the centres a small network must sharpen to
    fit it, and so gets to the edge of stability: `mlp` with its defaults at learning
    rate 0.8.

    **Arguments**

    - `n`: number of samples.
    - `shape`: of one input, such as (height, width, channels).
    - `classes`: number of them.
    - `noise`: relative to the distance of the centres from zero, not negative.
    - `seed`: draws everything.
    - `dtype`: of the arrays; None for JAX's default float.

    **Returns** inputs [n, *shape] and one-hot targets [n, classes].

    **Raises** `ValueError` if a size is not a positive whole number, `noise` is
    negative or not finite, or `dtype` is unfit.

    Source: the Gaussian mixture of textbooks.

    ```python
    >>> data = clusters(30, shape=(4,), classes=3, noise=0.0)
    >>> bool((data.inputs[0] == data.inputs[3]).all())
    True

    ```
    """
    dtype = float_dtype(dtype)
    check_counts(n=[n], shape=shape, classes=[classes])
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise={noise} must be finite and not negative.")
    at, about = jax.random.split(jax.random.key(seed))
    labels = jnp.arange(n) % classes
    centres = jax.random.normal(at, (classes, *shape), dtype)
    scatter = jax.random.normal(about, (n, *shape), dtype)
    inputs = (centres[labels] + noise * scatter) / math.sqrt(1 + noise**2)
    inputs -= jnp.mean(inputs, axis=0, keepdims=True)
    return Data(inputs, jax.nn.one_hot(labels, classes, dtype=dtype))
