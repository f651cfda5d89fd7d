"""Curvature along a trajectory: Hessian-vector products, sharpness, its ratio."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from matfree import decomp, eig

from rodjax.dynamics import Dynamics, Loss, State
from rodjax.stability import coordinate_thresholds
from rodjax.trajectory import Metric

# Up to this many parameters the matrix is formed and diagonalized directly.
DENSE = 32
# Krylov dimension of one Lanczos sweep, and sweeps at most.
KRYLOV = 12
SWEEPS = 30


class Eigenpair(NamedTuple):
    """The algebraically largest eigenvalue of a symmetric operator.

    - `value`: [].
    - `vector`: unit norm, a pytree like the parameters.
    - `residual`: |A v - value v| / |value|, []. Some eigenvalue lies within this
      relative distance of `value`; a residual above the tolerance means that it has
      not converged.
    """

    value: Float[Array, ""]
    vector: PyTree
    residual: Float[Array, ""]


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


def top_eigenpair(
    matvec: Callable[[PyTree], PyTree], guess: PyTree, *, tol: float | None = None
) -> Eigenpair:
    """Largest eigenvalue of a symmetric operator on pytrees, by restarted Lanczos.

    Sweeps of a short Lanczos process with full reorthogonalization (matfree), each
    started from the last Ritz vector, until the residual is below `tol`: a good `guess`
    (the eigenvector of the previous step) needs one sweep. Small operators are
    diagonalized directly. Safe in float32; vmaps and jits.

    **Arguments**

    - `matvec`: pytree -> pytree, linear and symmetric.
    - `guess`: a pytree of its argument's structure, not zero.
    - `tol`: relative residual to reach; the square root of the dtype's epsilon if
      `None`. After 30 sweeps the best pair so far comes back with its residual.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> scale = jnp.arange(1.0, 101.0)
    >>> pair = rj.top_eigenpair(lambda v: scale * v, jnp.ones(100))
    >>> float(pair.value.round(6)), bool(pair.residual < 1e-3)
    (100.0, True)

    ```
    """
    flat, unravel = ravel_pytree(guess)

    def apply(x):
        return ravel_pytree(matvec(unravel(x)))[0]

    def measured(vector):
        image = apply(vector)
        value = vector @ image
        scale = jnp.maximum(jnp.abs(value), jnp.finfo(flat.dtype).tiny)
        return Eigenpair(value, vector, jnp.linalg.norm(image - value * vector) / scale)

    if flat.size <= DENSE:
        matrix = jax.vmap(apply)(jnp.eye(flat.size, dtype=flat.dtype))
        pair = measured(jnp.linalg.eigh(matrix)[1][:, -1])
        return pair._replace(vector=unravel(pair.vector))

    tol = float(jnp.finfo(flat.dtype).eps) ** 0.5 if tol is None else tol
    lanczos = eig.eigh_partial(decomp.tridiag_sym(KRYLOV))
    # An exact eigenvector would end the Krylov space, and divide by zero, at once.
    noise = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    noise = noise * (tol / jnp.linalg.norm(noise))

    def sweep(carry):
        count, pair = carry
        start = pair.vector / jnp.linalg.norm(pair.vector) + noise
        start = start / jnp.linalg.norm(start)
        _, vectors = lanczos(apply, start)
        vector = vectors[-1] / jnp.linalg.norm(vectors[-1])
        # A Krylov space that ends early (a multiple of the identity) leaves NaN.
        whole = jnp.all(jnp.isfinite(vector))
        return count + 1, measured(jnp.where(whole, vector, start))

    def unfinished(carry):
        count, pair = carry
        return (count == 0) | ((pair.residual > tol) & (count < SWEEPS))

    unknown = jnp.full((), jnp.nan, flat.dtype)
    _, pair = jax.lax.while_loop(
        unfinished,
        sweep,
        (jnp.zeros((), jnp.int32), Eigenpair(unknown, flat, unknown)),
    )
    return pair._replace(vector=unravel(pair.vector))


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
    edges = coordinate_thresholds(dynamics, state, lr)
    root = jax.tree.map(jax.lax.rsqrt, edges)

    def matvec(v):
        curved = hvp(dynamics.loss, state.params, optax.tree.mul(root, v))
        return optax.tree.mul(root, curved)

    guess = random_direction(state.params) if guess is None else guess
    return top_eigenpair(matvec, guess, tol=tol)


def random_direction(params: PyTree) -> PyTree:
    """A fixed random vector like `params`, to start an iteration from."""
    return optax.tree.random_like(jax.random.key(0), params)


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
