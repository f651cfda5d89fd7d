"""In what precision accelerators multiply single-precision matrices."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.extend import core

PRODUCTS = "dot_general", "conv_general_dilated"
FLOAT = jnp.floating
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


def narrow_products(function: Callable[..., Any], *args: Any) -> str | None:
    """The dtype below single precision in which a function multiplies, if it does.

    Of matrix products and convolutions, as its program has them.

    ```python
    >>> import jax.numpy as jnp
    >>> from rodjax.optimizer import narrow_products
    >>> narrow_products(lambda w: w @ w, jnp.ones(3))
    >>> narrow_products(lambda w: w @ w.astype(jnp.bfloat16), jnp.ones(3, jnp.bfloat16))
    'bfloat16'

    ```
    """
    return _narrow(jax.make_jaxpr(function)(*args).jaxpr)


def _narrow(jaxpr: Any) -> str | None:
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            dtypes = [x.aval.dtype for x in equation.invars]
            short = [d for d in dtypes if d.itemsize < 4 and jnp.issubdtype(d, FLOAT)]
            if short:
                return str(short[0])
        is_jaxpr = lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)
        inside = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        for part in filter(is_jaxpr, inside):
            if found := _narrow(getattr(part, "jaxpr", part)):
                return found
    return None
