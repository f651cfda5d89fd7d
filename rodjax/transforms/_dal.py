"""DAL: a learning rate set by the discretization drift, by the curvature met.

Source: Rosca, Wu, Qin & Dherin, "On a continuous time model of gradient descent
dynamics and instability in deep learning", TMLR 2023, arXiv 2302.01952.
"""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax import curvature
from rodjax.transforms._extra import check_numbers, joint_scalar, loss_of_params, times


class ScaleByDalState(NamedTuple):
    """State of `scale_by_dal`: the learning rate of the last step, to log.

    `learning_rate` has shape `()` and the common dtype of the parameters; it is 0
    before the first step. `optax.tree.get(state, "learning_rate")` finds it in a
    chain.

    ```python
    >>> import jax.numpy as jnp
    >>> float(scale_by_dal().init(jnp.ones(3)).learning_rate)
    0.0

    ```
    """

    learning_rate: Float[Array, ""]


def scale_by_dal(
    p: ArrayLike = 1.0, max_lr: ArrayLike = 5.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the gradient `g` by the learning rate of DAL-p at this step.

    With $H$ the Hessian of the loss at the parameters,

    $$\eta = \min\left( 2 \left( \|H g\| / \|g\| \right)^{-p}, \eta_{\max} \right)$$

    `p = 1` is DAL: the edge of stability for the curvature that the gradient meets,
    so that no direction of it is expanded. A smaller `p` is bolder where that
    curvature exceeds 1, and `p = 0` is the constant `min(2, max_lr)`. Where `g`
    or `H g` vanishes it is `max_lr` for `p > 0`. For momentum, as in the paper:

        optax.chain(scale_by_dal(), optax.trace(0.9), optax.scale(-1.0))

    **Arguments**

    - `p`: the power, >= 0; numbers or (traced) scalar arrays, `max_lr` too.
    - `max_lr`: the highest learning rate, positive and finite.

    **Returns** a transformation from gradients to `lr g` of the same shapes and
    dtypes, with state `ScaleByDalState`. Its `update` takes, as extra
    arguments, `value_fn`, the loss as a function of the parameters (with further
    extra arguments that it names, such as a batch, passed on: give it the batch that
    `g` was taken on), or else `hvp`, a function from a vector like the parameters
    to `H` times it. It costs one Hessian-vector product.

    **Raises** `ValueError` if a number is out of range, `params` is empty or not
    real, or `update` is given neither `hvp` nor `value_fn` and `params`.

    Source: Rosca et al., TMLR 2023, arXiv 2302.01952.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> loss = lambda w: 2 * jnp.sum(w**2)  # H = 4, so lr = 2 / 4
    >>> w, tx = jnp.array([3.0, -4.0]), scale_by_dal()
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> updates.tolist(), float(state.learning_rate)
    ([6.0, -8.0], 0.5)

    ```
    """
    check_numbers({}, {"p": p})
    if isinstance(max_lr, numbers.Real) and not (
        float(max_lr) > 0 and math.isfinite(max_lr)
    ):
        raise ValueError(f"max_lr={max_lr} must be positive and finite.")

    def init_fn(params):
        return ScaleByDalState(joint_scalar(params, 0.0))

    def update_fn(
        updates,
        state,
        params: PyTree = None,
        *,
        value_fn=None,
        hvp=None,
        **extra_args,
    ):
        dtype = state.learning_rate.dtype
        # H g / g does not depend on the size of g, whose square may underflow.
        peak = optax.tree.norm(optax.tree.cast(updates, dtype), ord=jnp.inf)
        peak = jax.lax.stop_gradient(jnp.where(peak > 0, peak, 1))
        vector = times(1 / peak, updates)
        if hvp is None:
            loss = loss_of_params("dal", value_fn, params, extra_args)
            vector = optax.tree.cast_like(vector, params)
            image = curvature.hvp(loss, params, vector)
        else:
            image = hvp(vector)
        above, below = (
            optax.tree.norm(optax.tree.cast(tree, dtype), squared=True)
            for tree in (image, vector)
        )
        # Not > 0: NaN must go on as NaN. Both branches finite, so derivatives are.
        curved = (above != 0) & (below != 0)
        ratio = jnp.where(curved, above, 1) / jnp.where(curved, below, 1)
        power, cap = jnp.asarray(p, dtype), jnp.asarray(max_lr, dtype)
        rate = jnp.minimum(2 * ratio ** (-power / 2), cap)
        rate = jnp.where(curved | (power == 0), rate, cap)
        return times(rate, updates), ScaleByDalState(rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dal(
    p: ArrayLike = 1.0, max_lr: ArrayLike = 5.0
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with the learning rate of DAL-p, which needs no tuning.

    $w_{t+1} = w_t - \min(2 (\|H g\|/\|g\|)^{-p}, \eta_{\max})\, g$: `scale_by_dal`,
    whose arguments, extra arguments, errors and source these are, with the sign of
    descent.

    ```python
    >>> import jax, jax.numpy as jnp
    >>> loss = lambda w: 2 * jnp.sum(w**2)  # H = 4, so lr = 2 / 4
    >>> w, tx = jnp.array([3.0, -4.0]), dal()
    >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    >>> updates.tolist(), float(optax.tree.get(state, "learning_rate"))
    ([-6.0, 8.0], 0.5)

    ```
    """
    return optax.chain(scale_by_dal(p, max_lr), optax.scale(-1.0))
