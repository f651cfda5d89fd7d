"""Curvature along a trajectory: derivatives of the loss, sharpness and its ratio."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from rodjax.dynamics import Dynamics, Loss, State
from rodjax.eigen import Eigenpair, Eigenpairs, top_eigenpair, top_eigenpairs
from rodjax.stability import coordinate_thresholds
from rodjax.trajectory import Metric


def hvp(loss: Loss, params: PyTree, vector: PyTree) -> PyTree:
    """Hessian-vector product H(params) vector, as the jvp of the gradient.

    `vector` and the result have the structure and shapes of `params`.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> rj.hvp(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), jnp.ones(2)).tolist()
    [6.0, 12.0]

    ```
    """
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def third_derivative(loss: Loss, params: PyTree, u: PyTree, v: PyTree) -> PyTree:
    r"""Third derivative applied to two vectors: $T[u, v] = \nabla_w (u^T H(w) v)$.

    As nested jvps of the gradient. Symmetric in u and v, which have the structure and
    shapes of `params`, as has the result. T[u, u] is the gradient of the curvature
    $u^T H u$ along a fixed u.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> w, u, v = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> rj.third_derivative(lambda w: jnp.sum(w**3), w, u, v).tolist()
    [18.0, 48.0]

    ```
    """
    return jax.jvp(lambda w: hvp(loss, w, u), (params,), (v,))[1]


def sharpness(
    loss: Loss, params: PyTree, guess: PyTree | None = None, *, tol: float | None = None
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
    guess: PyTree | None = None,
    *,
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
    lr: PyTree = None,
    guess: PyTree | None = None,
    *,
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
    return top_eigenpair(_preconditioned(dynamics, state, lr), guess, tol=tol)


def preconditioned_eigenpairs(
    dynamics: Dynamics,
    state: State,
    k: int,
    lr: PyTree = None,
    guess: PyTree | None = None,
    *,
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
    return top_eigenpairs(_preconditioned(dynamics, state, lr), guess, tol=tol)


def _preconditioned(
    dynamics: Dynamics, state: State, lr: PyTree
) -> Callable[[PyTree], PyTree]:
    """The product with D^{-1/2} H D^{-1/2} at `state`."""
    edges = coordinate_thresholds(dynamics, state, lr)
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


def edge_of_stability(dynamics: Dynamics, *, tol: float | None = None) -> Metric:
    """Metric `sharpness_ratio` (see there) and its `residual`, warm-started.

    For `metrics=` of `integrate` and `descend`. The ratio is taken at the centre.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 2, metrics=[rj.edge_of_stability(sgd)])
    >>> run.metrics["sharpness_ratio"].round(6).tolist()
    [0.75, 0.75, 0.75]

    ```
    """

    def update(snapshot, vector, lr):
        pair = sharpness_ratio(dynamics, snapshot.centre, lr, vector, tol=tol)
        values = {"sharpness_ratio": pair.value, "residual": pair.residual}
        # A lane that has diverged must not hand NaN to a later warm start.
        return values, optax.tree.where(
            jnp.isfinite(pair.residual), pair.vector, vector
        )

    return Metric(lambda snapshot, lr: random_direction(snapshot.centre.params), update)


def spectrum(dynamics: Dynamics, k: int, *, tol: float | None = None) -> Metric:
    """Metric `ratio_1` to `ratio_k` of `preconditioned_eigenpairs`, warm-started.

    And the largest of their residuals, `residual`. For `metrics=` of `integrate` and
    `descend`, in place of `edge_of_stability`, whose `sharpness_ratio` is `ratio_1`.
    The ratios are taken at the centre.

    **Raises** `ValueError` if `k` is below 1, and from `init` if it exceeds the number
    of parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 2, metrics=[rj.spectrum(sgd, 2)])
    >>> run.metrics["ratio_2"].round(6).tolist()
    [0.25, 0.25, 0.25]

    ```
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")

    def update(snapshot, vectors, lr):
        pairs = preconditioned_eigenpairs(
            dynamics, snapshot.centre, k, lr, vectors, tol=tol
        )
        values = {f"ratio_{i + 1}": value for i, value in enumerate(pairs.values)}
        values["residual"] = jnp.max(pairs.residuals)
        # A lane that has diverged must not hand NaN to a later warm start.
        return values, optax.tree.where(
            jnp.isfinite(values["residual"]), pairs.vectors, vectors
        )

    return Metric(
        lambda snapshot, lr: starting_directions(snapshot.centre.params, k), update
    )
