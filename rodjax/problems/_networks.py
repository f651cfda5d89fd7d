"""Small smooth networks of the sources, in Flax: MLP and CNN."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rodjax.problems._base import Data, Problem
from rodjax.problems._checks import check_counts
from rodjax.problems._digits import digits
from rodjax.problems._supervised import Loss, supervised
from rodjax.problems._transformer import initializer

Activation = Callable[[Array], Array]

# Of the MLP's weights, relative to 1 / sqrt(fan_in).
MLP_SCALE = 0.6


def mlp(
    data: Data,
    *,
    widths: Sequence[int] = (16, 16),
    activation: str | Activation = "tanh",
    loss: Loss = "mse",
    seed: int = 0,
    chunk: int | None = None,
) -> Problem:
    """A multilayer perceptron on `data`, whose inputs it flattens.

    Weights start as `N(0, 0.6^2 / fan_in)`, biases at zero.

    **Arguments**

    - `data`: inputs [n, ...], targets [n, classes]; their dtype is that of the
      parameters.
    - `widths`: sizes of the hidden layers; () for a linear model.
    - `activation`: name of a function in `jax.nn`, or an elementwise callable.
    - `loss`: `"mse"` or `"cross-entropy"`, see `supervised`.
    - `seed`: draws the weights.
    - `chunk`: samples at a time, see `chunked_mean`.

    **Returns** the problem; its parameters are the nested dict of arrays
    `params["layers"][i]` `= {"kernel": [fan_in, fan_out], "bias": [fan_out]}` of a
    flax `nnx.Sequential`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices.

    Source: the small full-batch MLPs of Cohen et al., ICLR 2021, arXiv 2103.00065.

    ```python
    >>> import rodjax as rj
    >>> problem = rj.problems.mlp(rj.problems.digits(20), widths=(8,))
    >>> problem.params["layers"][0]["kernel"].shape
    (64, 8)
    >>> problem.loss(problem.params).shape
    ()

    ```
    """
    check_counts(widths=widths)
    function, dtype = _activation(activation), data.targets.dtype
    flat = Data(jnp.reshape(data.inputs, (len(data.inputs), -1)), data.targets)
    sizes = (flat.inputs.shape[1], *widths, flat.targets.shape[-1])

    def build(key: Array) -> nnx.Module:
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            # Keys of our own, so that the problem is the same with every version of
            # flax.
            key, own = jax.random.split(key)
            weights = jax.random.normal(own, (fan_in, fan_out), dtype)
            weights *= MLP_SCALE / math.sqrt(fan_in)
            layers += [_linear(weights), function]
        return nnx.Sequential(*layers[:-1])

    return supervised(build, flat, loss=loss, seed=seed, chunk=chunk, name="mlp")


def digits_mlp(
    n: int = 100,
    *,
    widths: Sequence[int] = (16, 16),
    activation: str | Activation = "tanh",
    loss: Loss = "mse",
    seed: int = 0,
    skip: int = 0,
    dtype: DTypeLike | None = None,
) -> Problem:
    """Full-batch training of an MLP `64 - widths - 10` on `digits`.

    With its defaults the reference problem of rodjax: `mlp` on 100 samples.

    **Arguments**

    - `n`: number of samples.
    - `widths`: sizes of the hidden layers; () for a linear model.
    - `activation`: name of a function in `jax.nn`, or an elementwise callable.
    - `loss`: `"mse"` or `"cross-entropy"`, see `supervised`.
    - `seed`: draws the weights.
    - `skip`: number of samples left out, as in `digits`.
    - `dtype`: of data, parameters and computation; None for JAX's default float.

    **Returns** the problem, as of `mlp`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices;
    `ImportError` if scikit-learn is not installed.

    Source: the small full-batch MLPs of Cohen et al., ICLR 2021, arXiv 2103.00065.

    ```python
    >>> problem = digits_mlp(20, widths=(8,))
    >>> problem.params["layers"][0]["kernel"].shape
    (64, 8)
    >>> problem.loss(problem.params).shape
    ()

    ```
    """
    data = digits(n, skip=skip, dtype=dtype)
    return mlp(data, widths=widths, activation=activation, loss=loss, seed=seed)


class CNN(nnx.Module):
    """Convolutions of width 3, each with an activation and average pooling of two."""

    def __init__(
        self,
        channels: Sequence[int],
        size: tuple[int, ...],
        given: int,
        classes: int,
        activation: Activation,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {
            "kernel_init": initializer(),
            "dtype": dtype,
            "param_dtype": dtype,
        }
        self.convolutions = nnx.List(
            nnx.Conv(
                before,
                after,
                (3,) * len(size),
                conv_general_dilated=_shifted,
                rngs=rngs,
                **common,
            )
            for before, after in itertools.pairwise((given, *channels))
        )
        left = math.prod(side // 2 ** len(channels) for side in size)
        self.head = nnx.Linear(left * channels[-1], classes, rngs=rngs, **common)
        self.activation = activation

    def __call__(self, x: Float[Array, "n *size c"]) -> Float[Array, "n classes"]:
        two = (2,) * (x.ndim - 2)
        for convolution in self.convolutions:
            x = nnx.avg_pool(self.activation(convolution(x)), two, two)
        return self.head(jnp.reshape(x, (len(x), -1)))


def cnn(
    data: Data,
    *,
    channels: Sequence[int] = (8, 8),
    activation: str | Activation = "tanh",
    loss: Loss = "mse",
    seed: int = 0,
    chunk: int | None = None,
) -> Problem:
    """A convolutional network on images, or on signals in one dimension.

    Each layer is a convolution 3 x 3, the activation and 2 x 2 average pooling, on
    signals of width 3 and 2, all of them smooth; a linear layer reads out the rest.
    Weights start as `N(0, 1 / fan_in)`, biases at zero.

    **Arguments**

    - `data`: inputs [n, height, width, channels] or [n, length, channels], targets [n,
      classes]; their dtype is that of the parameters.
    - `channels`: of the convolutions, at least one; height and width, or length, must
      allow as many halvings.
    - `activation`: name of a function in `jax.nn`, or an elementwise callable.
    - `loss`: `"mse"` or `"cross-entropy"`, see `supervised`.
    - `seed`: draws the weights.
    - `chunk`: samples at a time, see `chunked_mean`.

    **Returns** the problem; its parameters are the nested dict of
    `params["convolutions"][i]` and `params["head"]`, each a `kernel` and a
    `bias`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices, or
    the inputs are neither images nor signals, or too small for so many layers.

    Source: the small full-batch CNNs of Cohen et al., ICLR 2025, arXiv 2410.24206.

    ```python
    >>> import rodjax as rj
    >>> problem = rj.problems.cnn(rj.problems.digits(20), channels=(4, 4))
    >>> problem.params["convolutions"][1]["kernel"].shape
    (3, 3, 4, 4)

    ```
    """
    check_counts(channels=channels)
    (*size, given), classes = data.inputs.shape[1:], data.targets.shape[-1]
    if len(size) not in (1, 2):
        raise ValueError(
            f"data has inputs of shape {data.inputs.shape}: give images [n, height,"
            " width, channels] or signals [n, length, channels]."
        )
    if not channels or min(size) < 2 ** len(channels):
        sides = " x ".join(map(str, size))
        raise ValueError(
            f"channels={tuple(channels)} must be at least one and halve inputs of"
            f" {sides} as many times: give fewer layers."
        )
    function, dtype = _activation(activation), data.targets.dtype

    def build(key: Array) -> nnx.Module:
        rngs = nnx.Rngs(key)
        return CNN(
            channels, tuple(size), given, classes, function, dtype=dtype, rngs=rngs
        )

    return supervised(build, data, loss=loss, seed=seed, chunk=chunk, name="cnn")


def _shifted(
    x: Float[Array, "n *size c"],
    kernel: Float[Array, "*width c d"],
    *rest: Any,
    **given: Any,
) -> Float[Array, "n *size d"]:
    """The convolution of width 3, padded with zeros, as one product.

    Several sets of weights under a vmap, such as the ends of a flow or the lanes of a
    sweep, remain products, where XLA would make a grouped convolution, which is slow.
    """
    size = x.shape[1:-1]
    padded = jnp.pad(x, ((0, 0), *[(1, 1)] * len(size), (0, 0)))
    shifts = [
        padded[:, *(slice(i, i + n) for i, n in zip(corner, size, strict=True))]
        for corner in itertools.product(range(3), repeat=len(size))
    ]
    weights = jnp.reshape(kernel, (-1, kernel.shape[-1]))
    stacked = jnp.concatenate(shifts, axis=-1)
    return jnp.matmul(stacked, weights, precision=given.get("precision"))


def _linear(weights: Float[Array, "fan_in fan_out"]) -> nnx.Linear:
    return nnx.Linear(
        *weights.shape,
        kernel_init=lambda *_: weights,
        param_dtype=weights.dtype,
        # This too: without it flax would compute in what it infers.
        dtype=weights.dtype,
        rngs=nnx.Rngs(0),
    )


def _activation(activation: str | Activation) -> Activation:
    if not isinstance(activation, str):
        return activation
    found = getattr(jax.nn, activation, None)
    if callable(found):
        return cast(Activation, found)
    raise ValueError(
        f"activation={activation!r} is unknown: give the name of a function in"
        " jax.nn, such as 'tanh' or 'gelu', or a callable."
    )
