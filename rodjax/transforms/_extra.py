"""What the transformations share: checks, and the loss taken from extra args."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer import Loss

#: The loss and gradient that Optax passes along with `value_fn`, not meant for it.
_RESERVED = frozenset({"value", "grad"})


def loss_of_params(
    name: str,
    value_fn: Callable[..., Float[Array, ""]] | None,
    params: PyTree | None,
    extra_args: dict[str, Any],
) -> Loss:
    """`value_fn` as a function of the parameters alone.

    Its other arguments, such as a batch, are taken by name from the extra arguments
    of `update`, as in Optax's line searches; those it does not name are left alone,
    since in a chain they may belong to another transformation.

    **Arguments**

    - `name`: the transformation, for the error messages.
    - `value_fn`: function of the parameters, and of more by name, to a scalar.
    - `params`: the parameters given to `update`.
    - `extra_args`: the other extra arguments given to `update`.

    **Returns** a function of the parameters to a scalar.

    **Raises** `ValueError` if `value_fn` or `params` is missing.

    Source: the conventions of `optax.scale_by_backtracking_linesearch`.

    ```python
    >>> loss = loss_of_params("dal", lambda w, batch: w * batch, 1, {"batch": 2})
    >>> loss(3)
    6

    ```
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
    """`factor` times every leaf, each in its own dtype.

    ```python
    >>> import jax.numpy as jnp
    >>> times(jnp.float32(2.0), {"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype.name
    'bfloat16'

    ```
    """
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)


def check_numbers(
    decays: dict[str, ArrayLike], constants: dict[str, ArrayLike]
) -> None:
    """Decay rates in [0, 1) and constants >= 0, or a `ValueError` naming them."""
    # Traced values cannot be compared, so only plain numbers are checked.
    for name, value in decays.items():
        if isinstance(value, numbers.Real) and not 0 <= float(value) < 1:
            raise ValueError(f"{name}={value} is no decay rate: give it in [0, 1).")
    for name, value in constants.items():
        if isinstance(value, numbers.Real) and not float(value) >= 0:
            raise ValueError(f"{name}={value} is out of range: give {name} >= 0.")


def joint_scalar(params: PyTree, value: ArrayLike) -> Float[Array, ""]:
    """A scalar of this value, in the common dtype of the leaves of `params`."""
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("params has no array leaves: give it at least one.")
    # Leaves may differ in dtype, which strict promotion would refuse to join.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*leaves)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"params has dtype {dtype}: cast its leaves to a real floating dtype."
        )
    return jnp.full((), value, dtype)
