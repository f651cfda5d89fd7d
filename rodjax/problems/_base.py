"""What a training problem is: a name, a loss and the parameters to start from."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped


class Data(NamedTuple):
    """Samples to fit: n inputs and their targets.

    **Attributes**

    - `inputs`: `[n, ...]`: images `[n, height, width, channels]`, tokens `[n,
      length]`, or whatever the model takes.
    - `targets`: `[n, ..., classes]`, one-hot; their dtype is that of the training.

    ```python
    >>> import jax.numpy as jnp
    >>> data = Data(jnp.zeros((20, 8, 8, 1)), jnp.eye(10)[jnp.arange(20) % 10])
    >>> len(data.targets)
    20

    ```
    """

    inputs: Shaped[Array, "n ..."]
    targets: Float[Array, "n *outputs classes"]


class Problem(NamedTuple):
    """A deterministic (full-batch) training problem.

    **Attributes**

    - `name`: what the problem is called.
    - `loss`: function of the parameters, a pytree of arrays, to a scalar of shape
      `()`; pure, so that it can be differentiated and compiled.
    - `params`: where to start; its shapes and dtypes are those `loss` takes.
    - `draw`: function from a `jax.random` key to another start of the same
      distribution, so that a sweep may vary it; None where starts are not drawn.
    - `metrics`: name -> function of the parameters to a scalar, such as the accuracy;
      `rj.monitor(problem.metrics)` records them along runs and flows.

    Source: the full-batch setting of Cohen et al., ICLR 2021, arXiv 2103.00065.

    ```python
    >>> import jax.numpy as jnp
    >>> problem = Problem("parabola", lambda w: w**2 / 2, jnp.array(3.0))
    >>> float(problem.loss(problem.params))
    4.5

    ```
    """

    name: str
    loss: Callable[[PyTree], Float[Array, ""]]
    params: PyTree
    draw: Callable[[Array], PyTree] | None = None
    metrics: Mapping[str, Callable[[PyTree], Float[Array, ""]]] = MappingProxyType({})


def float_dtype(dtype: DTypeLike | None = None) -> jnp.dtype:
    """The floating dtype asked for; JAX's default one for None.

    The default is float64 when `jax_enable_x64` is on and float32 otherwise, as in
    `jnp.zeros`.

    **Raises** `ValueError` if `dtype` is not a real floating one, or it is float64
    and `jax_enable_x64` is off.

    ```python
    >>> print(float_dtype("float32"))
    float32

    ```
    """
    if dtype is None:
        return jnp.dtype(jnp.result_type(float))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype} is not real floating: give e.g. 'float32'.")
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"dtype={dtype} needs double precision: switch on jax_enable_x64."
        )
    return jnp.dtype(dtype)
