"""The mean over samples in bounded memory."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rodjax.problems._checks import is_count


def chunked_mean(
    function: Callable[[PyTree], Float[Array, " m"]],
    data: PyTree,
    *,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The mean over all samples of a function, computed some samples at a time.

    `sum_i function(data)_i / n`, as a `lax.scan` over chunks whose intermediate
    values are computed again in the backward pass rather than kept. So the memory of
    the mean and of all its derivatives is that of one chunk, whatever `n` is; the
    value is that of the plain mean up to the rounding of the sum.

    **Arguments**

    - `function`: from samples, a pytree like `data` with m in place of n samples, to
      one number for each, shape [m]. It may close over parameters.
    - `data`: pytree of arrays [n, ...].
    - `chunk`: number of samples at a time; it need not divide n. None for all.

    **Returns** the mean, a scalar.

    **Raises** `ValueError` if `chunk` is not a positive whole number, or the arrays
    of `data` do not have the same number of samples, or `function` does not return
    one number for each.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.linspace(0.0, 1.0, 1001)
    >>> loss = lambda w: chunked_mean(lambda x: (w * x - 1) ** 2, x, chunk=100)
    >>> whole = lambda w: jnp.mean((w * x - 1) ** 2)
    >>> bool(jnp.allclose(jax.grad(loss)(2.0), jax.grad(whole)(2.0)))
    True

    ```
    """
    if chunk is not None and not (is_count(chunk) and chunk > 0):
        raise ValueError(f"chunk={chunk} must be a positive whole number, or None.")
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(data)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"data has arrays of {sorted(sizes)} samples: give all the same number."
        )
    ((n,),) = sizes
    chunk = n if chunk is None else min(chunk, n)
    whole = n - n % chunk

    def total(piece: PyTree) -> Array:
        values = function(piece)
        samples = jax.tree.leaves(piece)[0].shape[:1]
        if values.shape != samples:
            raise ValueError(
                f"function returned shape {values.shape} for {samples[0]} samples: it"
                " must return one number for each."
            )
        return jnp.sum(values)

    if whole == chunk == n:
        return total(data) / n
    pieces = jax.tree.map(
        lambda x: jnp.reshape(x[:whole], (-1, chunk, *x.shape[1:])), data
    )
    start = jnp.zeros((), jax.eval_shape(total, data).dtype)
    # Within a scan nothing can undo the recomputation, so it need not be guarded.
    again = jax.checkpoint(total, prevent_cse=False)
    result, _ = jax.lax.scan(
        lambda sum, piece: (sum + again(piece), None), start, pieces
    )
    if whole < n:
        result += jax.checkpoint(total)(jax.tree.map(lambda x: x[whole:], data))
    return result / n
