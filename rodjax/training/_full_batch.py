"""Whether a loss is a function of the parameters alone, as a flow's must be."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import PyTree

from rodjax.optimizer import Loss


def check_full_batch(loss: Loss, params: PyTree) -> None:
    """Raise `ValueError` if the loss differs when asked twice; two evaluations of it.

    Not compiled, which would draw what the host draws once and for all.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        return
    one, other = (jnp.asarray(loss(params)) for _ in range(2))
    # Sums on an accelerator may differ in their last bits.
    near = float(jnp.finfo(one.dtype).eps) ** 0.5
    if not jnp.allclose(one, other, rtol=near, atol=0.0, equal_nan=True):
        raise ValueError(
            f"the loss is {one} and then {other} at the same parameters: it draws at "
            "random (dropout, a batch, noise of the host). Flows model full-batch "
            "training: give a loss that is a function of the parameters alone"
        )
