"""Edge gradient descent: edge flow in unit steps, used as an optimizer.

Source: Marion, "Edge Flow: A Tractable and Predictive Continuous-Time Model for
Gradient Descent at the Edge of Stability", arXiv 2606.18080 (reconstructed).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax.curvature import hvp
from rodjax.linalg import dot
from rodjax.optimizer import for_loops
from rodjax.transforms._extra import check_numbers, joint_scalar, loss_of_params, times


class EdgeGradientDescentState(NamedTuple):
    """State of `edge_gradient_descent`.

    `count` (int or float, shape `()`) is the number of optimizer steps taken;
    `direction` the unit vector of the oscillation, like the parameters; `radius`
    (shape `()`) its size, in the norm of the parameters.

    ```python
    >>> import jax.numpy as jnp
    >>> state = edge_gradient_descent(0.1, floor=1e-3).init(jnp.array([3.0, 4.0]))
    >>> round(float(jnp.linalg.norm(state.direction)), 4), state.radius.shape
    (1.0, ())

    ```
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride] (as Optax)
    direction: PyTree
    radius: Float[Array, ""]


def edge_gradient_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    floor: ArrayLike | None = None,
    key: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent that carries its oscillation at the edge instead of making it.

    With c the parameters, u and r the direction and the radius of the oscillation, g
    the gradient, H the Hessian at c, $S = u \cdot H u$ and $\eta$ the learning rate,
    one step is (reconstructed)

    $$c' = c - \tfrac\eta2 \left[ g(c + r u) + g(c - r u) \right], \quad
      r' = \max\left( r e^{\eta S - 2}, \mathrm{floor}\, \|c\| \right), \quad
      u' = \frac{u + \eta H u}{\|u + \eta H u\|} .$$

    Beyond the edge `r` grows and the symmetrized gradient lowers the sharpness, as
    the oscillation of gradient descent would, but the loss does not swing. On a
    quadratic, and wherever `r` is small, it is gradient descent.

    `u` takes a unit step of the Rayleigh quotient flow $H u - S u$ of edge flow,
    written so that it stays at the top of the spectrum: in $u + \eta (H u - S u)$ the
    flat directions would grow against it as soon as $\eta S > 2$.

    The centre `c` is itself subject to the edge. Where its own oscillation outgrows
    `r` (large learning rates, which meet the edge early) nothing is gained over
    gradient descent; a larger `floor`, such as 1e-3, then makes `r` lead. One so
    large that `floor ||c||` exceeds the radius at the edge keeps the sharpness below
    `2 / eta`.

    **Arguments**

    - `learning_rate`: a number, a (traced) scalar array, or a schedule from optimizer
      steps taken to the rate.
    - `floor`: the least radius relative to the norm of the parameters, >= 0; None for
      the epsilon of their dtype.
    - `key`: draws the first direction: an int or a key from `jax.random.key`.

    **Returns** a transformation, with state `EdgeGradientDescentState`, whose
    updates have the shapes and dtypes of the parameters. The gradients that it is given
    are not used. Its `update` takes `value_fn`, the loss as a function of the
    parameters, as extra argument (with further ones that it names, such as a batch,
    passed on); it costs two gradients and one Hessian-vector product.

    **Raises** `ValueError` if `floor` is negative, `params` is empty or not real,
    or `update` is not given `value_fn` or `params`.

    Source: Marion, arXiv 2606.18080 (reconstructed from a description of it).

    ```python
    >>> import jax.numpy as jnp
    >>> loss = lambda w: jnp.sum(w**4) / 4
    >>> w, tx = jnp.array([1.0, -1.0]), edge_gradient_descent(0.1)
    >>> updates, state = tx.update(jnp.zeros(2), tx.init(w), w, value_fn=loss)
    >>> [round(u, 4) for u in updates.tolist()]
    [-0.1, 0.1]

    ```
    """
    if floor is not None:
        check_numbers({}, {"floor": floor})

    def init_fn(params):
        radius = joint_scalar(params, 0.0)
        rng = jax.random.key(key) if isinstance(key, int) else key
        drawn = optax.tree.random_like(rng, params)
        direction = times(1 / _norm(drawn, radius.dtype), drawn)
        count = jnp.zeros([], jnp.int32)
        return EdgeGradientDescentState(
            count, direction, _least_radius(floor, params, radius.dtype)
        )

    def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
        del updates
        loss = loss_of_params("edge_gradient_descent", value_fn, params, extra_args)
        count, direction, radius = state
        dtype, grad = radius.dtype, for_loops(jax.grad(loss))
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(rate, dtype)

        arm = times(radius, direction)
        ends = optax.tree.add(params, arm), optax.tree.sub(params, arm)
        updates = times(-rate / 2, optax.tree.add(grad(ends[0]), grad(ends[1])))

        image = hvp(loss, params, direction)
        curvature = dot(
            optax.tree.cast(direction, dtype), optax.tree.cast(image, dtype)
        )
        radius = jnp.maximum(
            radius * jnp.exp(rate * curvature - 2), _least_radius(floor, params, dtype)
        )
        turned = optax.tree.add(direction, times(rate, image))
        norm = _norm(turned, dtype)
        # At a curvature of exactly -1 / rate nothing would be left of the direction.
        direction = optax.tree.where(norm > 0, times(1 / norm, turned), direction)
        count = optax.safe_increment(jnp.asarray(count))
        return updates, EdgeGradientDescentState(count, direction, radius)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _norm(tree: PyTree, dtype: jnp.dtype) -> Float[Array, ""]:
    """The norm, in a dtype that joins those of all leaves."""
    return optax.tree.norm(optax.tree.cast(tree, dtype))


def _least_radius(
    floor: ArrayLike | None, params: PyTree, dtype: jnp.dtype
) -> Float[Array, ""]:
    """The least radius."""
    relative = jnp.finfo(dtype).eps if floor is None else floor
    return jnp.asarray(relative, dtype) * _norm(params, dtype)
