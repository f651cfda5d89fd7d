"""The largest eigenvalues of the Hessian, plain and over the stability threshold."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.curvature._derivatives import hvp
from rodjax.linalg import (
    Eigenpair,
    Eigenpairs,
    alike,
    refined_eigenpair,
    rows_like,
    scattered,
    top_eigenpair,
    top_eigenpairs,
)
from rodjax.optimizer import (
    Dynamics,
    Loss,
    State,
    check_mesh,
    compiled,
    coordinate_thresholds,
    for_loops,
)


def sharpness(
    loss: Callable[..., Float[Array, ""]],
    params: PyTree,
    *,
    args: tuple[Any, ...] = (),
    guess: PyTree | None = None,
    products: int | None = None,
    tol: float | None = None,
) -> Eigenpair:
    """The sharpness: the largest eigenvalue of the loss's Hessian, with eigenvector.

    Compiled once for a loss and the shapes of its arguments, whether it is called under
    `jax.jit` or not.

    **Arguments**

    - `loss`: `loss(params, *args)` -> scalar.
    - `params`: any pytree of floats.
    - `args`: what the loss takes besides, such as a batch: arrays, traced, so that the
      next batch costs no compilation as a new function of the parameters would.
    - `guess`: a warm start, a pytree like `params`; random if `None`.
    - `products`: Hessian-vector products to spend, 1 to 3 where `guess` is the vector
      of a few steps before; `residual` tells how far they led. As
      `rodjax.linalg.refined_eigenpair`, with its memory. `None`: as many as `tol`
      needs, and eight that look for an eigenvalue above: as `top_eigenpair`.
    - `tol`: relative residual to reach, as in `top_eigenpairs`.

    **Raises** `ValueError` for `products` below 1, or beside `tol`.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> loss = lambda w, scale: 0.5 * scale * (3.0 * w[0] ** 2 + w[1] ** 2)
    >>> pair = rj.sharpness(loss, jnp.zeros(2), args=(1.0,))
    >>> float(pair.value)
    3.0
    >>> again = rj.sharpness(
    ...     loss, jnp.zeros(2), args=(2.0,), guess=pair.vector, products=1
    ... )
    >>> float(again.value), float(again.residual)
    (6.0, 0.0)

    ```
    """
    check_products(products, tol)
    check_mesh(params, "params")
    return _sharpness(loss, params, args, guess, products, tol)


@compiled
def _sharpness(loss, params, args, guess, products, tol) -> Eigenpair:
    guess = starting_direction(params) if guess is None else guess
    at = lambda w: loss(w, *args)
    pair = _largest(lambda v: hvp(at, params, v), guess, products, tol)
    return pair._replace(vector=alike(pair.vector, params))


def check_products(products: int | None, tol: float | None) -> None:
    if products is not None and products < 1:
        raise ValueError(f"products must be at least 1, or None; got {products}")
    if products is not None and tol is not None:
        raise ValueError(
            "give products, a number of products to spend, or tol, a residual to "
            "reach, not both"
        )


def _largest(
    matvec: Callable[[PyTree], PyTree],
    guess: PyTree,
    products: int | None,
    tol: float | None,
) -> Eigenpair:
    if products is None:
        return top_eigenpair(matvec, guess, tol=tol)
    return refined_eigenpair(matvec, guess, products)


def hessian_eigenpairs(
    loss: Loss,
    params: PyTree,
    k: int,
    *,
    guess: PyTree | None = None,
    tol: float | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues of the loss's Hessian, with eigenvectors.

    `guess` is a warm start, a pytree like `params` with a leading axis k (the vectors
    of a nearby Hessian); random if `None`. `tol` as in `top_eigenpairs`.

    **Raises** `ValueError` if `k` is below 1 or above the number of parameters, or not
    the leading axis of `guess`.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> loss = lambda w: 0.5 * (3.0 * w[0] ** 2 + w[1] ** 2)
    >>> rj.hessian_eigenpairs(loss, jnp.zeros(2), 2).values.tolist()
    [3.0, 1.0]

    ```
    """
    guess = starting_directions(params, k, guess)
    return _laid_out(
        top_eigenpairs(lambda v: hvp(loss, params, v), guess, tol=tol), params
    )


def sharpness_ratio(
    dynamics: Dynamics,
    state: State,
    *,
    lr: PyTree = None,
    grad: PyTree | None = None,
    guess: PyTree | None = None,
    products: int | None = None,
    tol: float | None = None,
) -> Eigenpair:
    r"""Preconditioned sharpness over its threshold: 1 is the edge of stability.

    $\lambda_{\max}(D^{-1/2} H D^{-1/2})$ with D the diagonal of
    `coordinate_thresholds` at `state`, whose second moments are the preconditioner. For
    GD it is the sharpness times eta/2. The eigenvector is in the coordinates
    $D^{1/2} w$; `guess` is a warm start in the same. `products` and `tol` as in
    `sharpness`. Where the optimizer clips the gradient, thresholds are higher by as
    much; `grad` is the gradient that it is shown: if `None`, the loss's at `state`.

    Before the first step of Adam there is no second moment yet: thresholds are those of
    its epsilon, and the ratio is large by orders of magnitude.

    **Raises** `ValueError` for `products` below 1, or beside `tol`. **Warns**, once,
    where linear theory has no threshold for the optimizer (steps by the gradient's
    sign, normalized or orthogonalized ones), and says why; the value has no meaning
    then.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> float(rj.sharpness_ratio(sgd, state).value.round(6))
    0.75

    ```
    """
    check_products(products, tol)
    check_mesh(state.params, "params")
    return _ratio(dynamics, state, lr, grad, guess, products, tol)


@compiled
def _ratio(dynamics, state, lr, grad, guess, products, tol) -> Eigenpair:
    guess = starting_direction(state.params) if guess is None else guess
    matvec = _preconditioned(dynamics, state, lr=lr, grad=grad)
    pair = _largest(matvec, guess, products, tol)
    return pair._replace(vector=alike(pair.vector, state.params))


def preconditioned_eigenpairs(
    dynamics: Dynamics,
    state: State,
    k: int,
    *,
    lr: PyTree = None,
    grad: PyTree | None = None,
    guess: PyTree | None = None,
    tol: float | None = None,
) -> Eigenpairs:
    r"""The k largest preconditioned eigenvalues over their threshold.

    Of $D^{-1/2} H D^{-1/2}$ as in `sharpness_ratio`, which is the first of them: every
    mode above 1 is unstable. The eigenvectors are orthonormal in the coordinates
    $D^{1/2} w$; `guess` is a warm start in the same, a pytree like the parameters with
    a leading axis k, random if `None`. `grad` as there, `tol` as in `top_eigenpairs`.

    **Raises** `ValueError` if `k` is below 1 or above the number of parameters, or not
    the leading axis of `guess`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> rj.preconditioned_eigenpairs(sgd, state, 2).values.round(6).tolist()
    [0.75, 0.25]

    ```
    """
    guess = starting_directions(state.params, k, guess)
    matvec = _preconditioned(dynamics, state, lr=lr, grad=grad)
    return _laid_out(top_eigenpairs(matvec, guess, tol=tol), state.params)


def _laid_out(pairs: Eigenpairs, params: PyTree) -> Eigenpairs:
    """Each vector over devices as the parameters are."""
    like = rows_like(params, len(pairs.values))
    return pairs._replace(vectors=alike(pairs.vectors, like))


def _preconditioned(
    dynamics: Dynamics, state: State, *, lr: PyTree, grad: PyTree | None
) -> Callable[[PyTree], PyTree]:
    """The product with D^{-1/2} H D^{-1/2} at `state`."""
    reason = dynamics.no_edge(state.params, lr=lr)
    if reason is not None:
        warnings.warn(
            "a ratio to the stability threshold has no meaning for this optimizer: "
            f"{reason}",
            stacklevel=2,
        )
    slope_of = for_loops(jax.grad(dynamics.loss))
    grad = slope_of(state.params) if grad is None else grad
    edges = coordinate_thresholds(dynamics, state, lr=lr, grad=grad)
    root = jax.tree.map(jax.lax.rsqrt, edges)

    def matvec(v):
        curved = hvp(dynamics.loss, state.params, optax.tree.mul(root, v))
        return optax.tree.mul(root, curved)

    return matvec


def starting_direction(params: PyTree) -> PyTree:
    """A fixed random vector like `params`, to start an iteration from."""
    return alike(scattered(params, 0), params)


def starting_directions(params: PyTree, k: int, guess: PyTree | None = None) -> PyTree:
    """`guess`, checked, or k fixed random vectors like `params`."""
    check_mesh(params, "params")
    size = optax.tree.size(params)
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the {size} parameters; got {k}")
    like = rows_like(params, k)
    if guess is None:
        return starting_direction(like)
    if jax.tree.map(jnp.shape, guess) != jax.tree.map(jnp.shape, like):
        raise ValueError(
            f"guess must be a pytree like the parameters with a leading axis k = {k}"
        )
    return guess
