"""What the transformations that look at the loss share: taking it from extra args."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree

from rodjax.dynamics import Loss

#: The loss and gradient that Optax passes along with ``value_fn``, not meant for it.
_RESERVED = frozenset({"value", "grad"})


def loss_of_params(
    name: str,
    value_fn: Callable[..., Float[Array, ""]] | None,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> Loss:
    """``value_fn`` as a function of the parameters alone.

    Its other arguments, such as a batch, are taken by name from the extra arguments
    of ``update``, as in Optax's line searches; those it does not name are left alone,
    since in a chain they may belong to another transformation.

    Args:
        name: the transformation, for the error messages.
        value_fn: function of the parameters, and of more by name, to a scalar.
        params: the parameters given to ``update``.
        extra_args: the other extra arguments given to ``update``.

    Returns:
        A function of the parameters to a scalar.

    Raises:
        ValueError: ``value_fn`` or ``params`` is missing.

    Source: the conventions of :func:`optax.scale_by_backtracking_linesearch`.

    Example:
        >>> loss = loss_of_params("dal", lambda w, batch: w * batch, 1, {"batch": 2})
        >>> loss(3)
        6
    """
    if value_fn is None:
        raise ValueError(
            f"{name} needs the loss: call update(..., params, value_fn=loss)."
        )
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(..., params, ...).")
    names = list(inspect.signature(value_fn).parameters)[1:]
    taken = {
        key: value
        for key, value in extra_args.items()
        if key in names and key not in _RESERVED
    }
    return lambda w: value_fn(w, **taken)


def times(factor: Float[Array, ""], tree: PyTree) -> PyTree:
    """``factor`` times every leaf, each in its own dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> times(jnp.float32(2.0), {"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype.name
        'bfloat16'
    """
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)
