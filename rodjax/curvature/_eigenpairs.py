"""The largest eigenvalues of the Hessian, plain and over the stability threshold."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from rodjax.curvature._derivatives import hvp
from rodjax.linalg import Eigenpair, Eigenpairs, top_eigenpair, top_eigenpairs
from rodjax.optimizer import Dynamics, Loss, State, coordinate_thresholds


def sharpness(
    loss: Loss,
    params: PyTree,
    *,
    guess: PyTree | None = None,
    tol: float | None = None,
) -> Eigenpair:
    """The sharpness: the largest eigenvalue of the loss's Hessian, with eigenvector.

    `guess` is a warm start, a pytree like `params`; random if `None`.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> loss = lambda w: 0.5 * (3.0 * w[0] ** 2 + w[1] ** 2)
    >>> float(rj.sharpness(loss, jnp.zeros(2)).value)
    3.0

    ```
    """
    guess = random_direction(params) if guess is None else guess
    return top_eigenpair(lambda v: hvp(loss, params, v), guess, tol=tol)


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
    return top_eigenpairs(lambda v: hvp(loss, params, v), guess, tol=tol)


def sharpness_ratio(
    dynamics: Dynamics,
    state: State,
    *,
    lr: PyTree = None,
    guess: PyTree | None = None,
    tol: float | None = None,
) -> Eigenpair:
    r"""Preconditioned sharpness over its threshold: 1 is the edge of stability.

    $\lambda_{\max}(D^{-1/2} H D^{-1/2})$ with D the diagonal of
    `coordinate_thresholds` at `state`, whose second moments are the preconditioner. For
    GD it is the sharpness times eta/2. The eigenvector is in the coordinates
    $D^{1/2} w$; `guess` is a warm start in the same.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> float(rj.sharpness_ratio(sgd, state).value.round(6))
    0.75

    ```
    """
    guess = random_direction(state.params) if guess is None else guess
    return top_eigenpair(_preconditioned(dynamics, state, lr=lr), guess, tol=tol)


def preconditioned_eigenpairs(
    dynamics: Dynamics,
    state: State,
    k: int,
    *,
    lr: PyTree = None,
    guess: PyTree | None = None,
    tol: float | None = None,
) -> Eigenpairs:
    r"""The k largest preconditioned eigenvalues over their threshold.

    Of $D^{-1/2} H D^{-1/2}$ as in `sharpness_ratio`, which is the first of them: every
    mode above 1 is unstable. The eigenvectors are orthonormal in the coordinates
    $D^{1/2} w$; `guess` is a warm start in the same, a pytree like the parameters with
    a leading axis k, random if `None`. `tol` as in `top_eigenpairs`.

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
    return top_eigenpairs(_preconditioned(dynamics, state, lr=lr), guess, tol=tol)


def _preconditioned(
    dynamics: Dynamics, state: State, *, lr: PyTree
) -> Callable[[PyTree], PyTree]:
    """The product with D^{-1/2} H D^{-1/2} at `state`."""
    edges = coordinate_thresholds(dynamics, state, lr=lr)
    root = jax.tree.map(jax.lax.rsqrt, edges)

    def matvec(v):
        curved = hvp(dynamics.loss, state.params, optax.tree.mul(root, v))
        return optax.tree.mul(root, curved)

    return matvec


def random_direction(params: PyTree) -> PyTree:
    """A fixed random vector like `params`, to start an iteration from."""
    return optax.tree.random_like(jax.random.key(0), params)


def starting_directions(params: PyTree, k: int, guess: PyTree | None = None) -> PyTree:
    """`guess`, checked, or k fixed random vectors like `params`."""
    size = optax.tree.size(params)
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the {size} parameters; got {k}")
    like = jax.tree.map(lambda x: jnp.broadcast_to(x, (k, *jnp.shape(x))), params)
    if guess is None:
        return random_direction(like)
    if jax.tree.map(jnp.shape, guess) != jax.tree.map(jnp.shape, like):
        raise ValueError(
            f"guess must be a pytree like the parameters with a leading axis k = {k}"
        )
    return guess
