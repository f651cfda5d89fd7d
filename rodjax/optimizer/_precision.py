"""In what precision accelerators multiply single-precision matrices."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def precise(function: F) -> F:
    """The function with its matrix products in full precision, unless JAX was told.

    GPUs and TPUs multiply float32 matrices in TF32 or bfloat16 by default, with errors
    of one in a thousand, in which what a flow follows from rounding errors on is lost.
    A precision that the user has set is left as it is, the default one too:
    `jax.config.update("jax_default_matmul_precision", "default")`.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> from rodjax.optimizer import precise
    >>> product = jax.make_jaxpr(precise(lambda w: w @ w))(jnp.ones(3))
    >>> "HIGHEST" in str(product)
    True

    ```
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        config: Any = jax.config
        if config.jax_default_matmul_precision is not None:
            return function(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return cast(F, call)
