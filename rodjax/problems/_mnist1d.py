"""MNIST-1D, a small data set of signals, which its own package generates."""

import random
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from rodjax.problems._base import Data, float_dtype
from rodjax.problems._checks import check_counts, is_count

SAMPLES = 4000
LENGTH = 40
CLASSES = 10


def mnist1d(n: int, *, skip: int = 0, dtype: DTypeLike | None = None) -> Data:
    """Samples `skip, ..., skip + n - 1` of the training part of MNIST-1D.

    Ten shapes, one for each digit, stretched, moved, sheared and noisy. Nothing is
    downloaded: the package `mnist1d` generates them with its own settings and seed, and
    scales all of them to mean 0 and standard deviation 1.

    **Arguments**

    - `n`: number of samples, positive.
    - `skip`: number of samples to leave out at the beginning, for a different part of
      the data; `n + skip <= 4000`.
    - `dtype`: of the arrays; None for JAX's default float.

    **Returns** inputs of shape [n, 40, 1] and one-hot targets of shape [n, 10].

    **Raises** `ValueError` if `n` or `skip` is out of range, or `dtype` is unfit;
    `ImportError` if mnist1d is not installed.

    Source: Greydanus, Kobak, arXiv 2011.14439.

    ```python
    >>> inputs, targets = mnist1d(20)
    >>> inputs.shape, targets.shape
    ((20, 40, 1), (20, 10))
    >>> targets[3].tolist().index(1.0)
    5

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
    signals, labels = (array[skip : skip + n] for array in _generated())
    inputs = np.reshape(signals, (n, LENGTH, 1))
    return Data(jnp.asarray(inputs, dtype), jnp.asarray(np.eye(CLASSES)[labels], dtype))


@lru_cache
def _generated() -> tuple[Float[np.ndarray, "4000 40"], Int[np.ndarray, " 4000"]]:
    """All signals and their labels, once for a process: it takes a second."""
    try:
        from mnist1d.data import make_dataset
    except ImportError as error:
        raise ImportError(
            "mnist1d needs the package mnist1d: pip install 'rodjax[data]'."
        ) from error
    # It seeds the generators that everybody shares.
    shared, others = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        found = make_dataset()
    finally:
        random.setstate(shared)
        np.random.set_state(others)  # noqa: NPY002
    return found["x"], found["y"]
