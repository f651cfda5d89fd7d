"""Handwritten digits, and a small MLP to fit them at the edge of stability."""

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rodjax.problems.base import Problem, float_dtype

SAMPLES = 1797
PIXELS = 64
CLASSES = 10
WEIGHT_SCALE = 0.6

Activation = Callable[[Array], Array]


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def digits(
    n: int, *, skip: int = 0, dtype: DTypeLike | None = None
) -> tuple[Float[Array, "n 64"], Float[Array, "n 10"]]:
    """Samples ``skip, ..., skip + n - 1`` of scikit-learn's handwritten digits.

    ``inputs = (raw - mean) / std``: ``mean`` is that of each pixel over the chosen
    samples, ``std`` one number, the standard deviation of all their raw pixels.

    Args:
        n: number of samples, positive.
        skip: number of samples to leave out at the beginning, for a different part
            of the data; ``n + skip <= 1797``.
        dtype: of the arrays; None for JAX's default float.

    Returns:
        Inputs of shape [n, 64] and one-hot targets of shape [n, 10].

    Raises:
        ValueError: ``n`` or ``skip`` is out of range, or ``dtype`` is unfit.
        ImportError: scikit-learn is not installed.

    Source: ``sklearn.datasets.load_digits`` (8 x 8 images of the UCI data set
    "Optical Recognition of Handwritten Digits").

    Example:
        >>> inputs, targets = digits(20)
        >>> inputs.shape, targets.shape
        ((20, 64), (20, 10))
        >>> targets[3].tolist().index(1.0)
        3
    """
    dtype = float_dtype(dtype)
    if not _is_int(n) or n < 1:
        raise ValueError(f"n={n} must be a positive whole number of samples.")
    if not _is_int(skip) or skip < 0:
        raise ValueError(f"skip={skip} must be a whole number of samples >= 0.")
    if n + skip > SAMPLES:
        raise ValueError(
            f"n + skip = {n + skip} exceeds the {SAMPLES} samples: lower n or skip."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits needs scikit-learn: pip install 'rodjax[data]'."
        ) from error
    data, labels = load_digits(return_X_y=True)
    raw, labels = np.asarray(data)[skip : skip + n], labels[skip : skip + n]
    inputs = (raw - raw.mean(axis=0, keepdims=True)) / raw.std()
    return jnp.asarray(inputs, dtype), jnp.asarray(np.eye(CLASSES)[labels], dtype)


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


def _half_squared_error(
    outputs: Float[Array, "n k"], targets: Float[Array, "n k"]
) -> Float[Array, " n"]:
    return jnp.sum((outputs - targets) ** 2, axis=-1) / 2


_LOSSES = {
    "mse": _half_squared_error,
    "cross-entropy": optax.softmax_cross_entropy,
}


def digits_mlp(
    n: int = 100,
    *,
    widths: Sequence[int] = (16, 16),
    activation: str | Activation = "tanh",
    loss: Literal["mse", "cross-entropy"] = "mse",
    seed: int = 0,
    skip: int = 0,
    dtype: DTypeLike | None = None,
) -> Problem:
    """Full-batch training of an MLP ``64 - widths - 10`` on :func:`digits`.

    Weights start as ``N(0, 0.6^2 / fan_in)``, biases at zero. The loss is the mean
    over the samples of ``||outputs - targets||^2 / 2`` (``"mse"``) or of the softmax
    cross entropy (``"cross-entropy"``, :func:`optax.softmax_cross_entropy`).

    Args:
        n: number of samples.
        widths: sizes of the hidden layers; () for a linear model.
        activation: name of a function in ``jax.nn``, or an elementwise callable.
        loss: ``"mse"`` or ``"cross-entropy"``.
        seed: draws the weights.
        skip: number of samples left out, as in :func:`digits`.
        dtype: of data, parameters and computation; None for JAX's default float.

    Returns:
        The problem; its parameters are the nested dict of arrays
        ``params["layers"][i]`` ``= {"kernel": [fan_in, fan_out], "bias": [fan_out]}``
        of a flax ``nnx.Sequential``; the data are closed over by the loss.

    Raises:
        ValueError: an argument is out of range or not one of the choices.
        ImportError: flax or scikit-learn is not installed.

    Source: the small full-batch MLPs of Cohen et al., ICLR 2021, arXiv 2103.00065.

    Example:
        >>> problem = digits_mlp(20, widths=(8,))
        >>> problem.params["layers"][0]["kernel"].shape
        (64, 8)
        >>> problem.loss(problem.params).shape
        ()
    """
    dtype = float_dtype(dtype)
    if not all(_is_int(width) and width > 0 for width in widths):
        raise ValueError(f"widths={widths} must be positive whole numbers.")
    if loss not in _LOSSES:
        raise ValueError(f"loss={loss!r} is unknown: give one of {list(_LOSSES)}.")
    function, per_sample = _activation(activation), _LOSSES[loss]
    inputs, targets = digits(n, skip=skip, dtype=dtype)
    try:
        from flax import nnx
    except ImportError as error:
        raise ImportError("digits_mlp needs flax: pip install 'rodjax[data]'.") from (
            error
        )

    def init(key, shape, dtype):
        return WEIGHT_SCALE / math.sqrt(shape[0]) * jax.random.normal(key, shape, dtype)

    def layers(key):
        sizes = (PIXELS, *widths, CLASSES)
        for fan_in, fan_out in itertools.pairwise(sizes):
            # Keys of our own, so that the problem is the same with every version of
            # flax.
            key, own = jax.random.split(key)
            # dtype too: without it flax would compute in what it infers.
            yield nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=lambda _, shape, dtype, own=own: init(own, shape, dtype),
                param_dtype=dtype,
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
            yield function

    def model(key):
        *stack, _ = layers(key)
        return nnx.split(nnx.Sequential(*stack), nnx.Param)

    graph, state = model(jax.random.key(seed))

    def mean_loss(params):
        return jnp.mean(per_sample(nnx.merge(graph, params)(inputs), targets))

    def draw(key):
        return nnx.to_pure_dict(model(key)[1])

    name = f"digits mlp ({loss})"
    return Problem(name, mean_loss, nnx.to_pure_dict(state), draw)
