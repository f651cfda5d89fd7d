"""Handwritten digits, which come with scikit-learn."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rodjax.problems._base import Data, float_dtype
from rodjax.problems._checks import check_counts, is_count

SAMPLES = 1797
SIDE = 8
CLASSES = 10


def digits(n: int, *, skip: int = 0, dtype: DTypeLike | None = None) -> Data:
    """Samples `skip, ..., skip + n - 1` of scikit-learn's handwritten digits.

    `inputs = (raw - mean) / std`: `mean` is that of each pixel over the chosen
    samples, `std` one number, the standard deviation of all their raw pixels.

    **Arguments**

    - `n`: number of samples, positive.
    - `skip`: number of samples to leave out at the beginning, for a different part of
      the data; `n + skip <= 1797`.
    - `dtype`: of the arrays; None for JAX's default float.

    **Returns** inputs of shape [n, 8, 8, 1] and one-hot targets of shape [n, 10].

    **Raises** `ValueError` if `n` or `skip` is out of range, or `dtype` is unfit;
    `ImportError` if scikit-learn is not installed.

    Source: `sklearn.datasets.load_digits` (8 x 8 images of the UCI data set
    "Optical Recognition of Handwritten Digits").

    ```python
    >>> inputs, targets = digits(20)
    >>> inputs.shape, targets.shape
    ((20, 8, 8, 1), (20, 10))
    >>> targets[3].tolist().index(1.0)
    3

    ```
    """
    dtype = float_dtype(dtype)
    check_counts(n=[n])
    if not is_count(skip) or skip < 0:
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
    inputs = np.reshape(inputs, (n, SIDE, SIDE, 1))
    return Data(jnp.asarray(inputs, dtype), jnp.asarray(np.eye(CLASSES)[labels], dtype))
