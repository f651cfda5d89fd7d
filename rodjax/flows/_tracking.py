"""The top eigenspace of the preconditioned Hessian, carried along in a flow's state."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.curvature import preconditioned_eigenpairs
from rodjax.linalg import combine, gram, orthonormal
from rodjax.optimizer import Dynamics, State, coordinate_thresholds

# Rate per step at which directions turn, in units of the eigenvalues of P^-1 H, and at
# which they are brought back to unit length: twice an edge of 2, within Heun's reach.
RATE = 2.0
# Largest threshold of a coordinate that is told from an infinite one: float32 holds the
# square of its inverse.
STEEPEST = 1e15


class Tracked(NamedTuple):
    """The tracked directions and what the Hessian makes of them.

    - `directions`: U with U P U^T = I, k pytrees like the parameters on a leading axis.
    - `images`: likewise, H U. `curvature`: [k, k], U H U^T.
    - `rate`: likewise, dU/dt of the carried directions.
    """

    directions: PyTree
    images: PyTree
    curvature: Float[Array, "k k"]
    rate: PyTree


def turn(
    curve: Callable[[PyTree], PyTree], inverse: PyTree, carried: PyTree
) -> Tracked:
    """One look at the Hessian `curve`: k products, for its use and for the tracking.

    Subspace iteration in continuous time (Oja's flow), rotating inside too, towards
    eigenvectors of descending eigenvalues: with A = U H U^T and P^-1 = diag(inverse),
    du_i/dt = rate (P^-1 H u_i - A_ii u_i - 2 sum_{j<i} A_ij u_j).
    """
    u = orthonormal(carried, jax.tree.map(lambda x: 1.0 / x, inverse))
    images = jax.vmap(curve)(u)
    curvature = gram(images, u)
    curvature = 0.5 * (curvature + curvature.T)
    kept = combine(2.0 * jnp.tril(curvature, -1) + jnp.diag(jnp.diag(curvature)), u)
    rate = jax.tree.map(
        lambda p, h, k, u, c: RATE * (p[None] * h - k + (u - c)),
        *(inverse, images, kept, u, carried),
    )
    return Tracked(u, images, curvature, rate)


def top_directions(
    dynamics: Dynamics, state: State, count: int, *, lr: PyTree
) -> PyTree:
    """The `count` top eigenvectors of P^-1 H at `state`, on a leading axis.

    Fewer if there are fewer parameters.
    """
    count = min(count, optax.tree.size(state.params))
    # A learning rate of zero, as at the start of a warm-up, has no edge.
    edges = jax.tree.map(
        lambda e: jnp.minimum(e, STEEPEST),
        coordinate_thresholds(dynamics, state, lr=lr),
    )
    pairs = preconditioned_eigenpairs(dynamics, state, count, lr=lr)
    # D = 2 P, and the eigenvectors are in the coordinates D^1/2 w.
    vectors = jax.tree.map(
        lambda v, e: v * jax.lax.rsqrt(0.5 * e)[None], pairs.vectors, edges
    )
    return with_sign(vectors)


def with_sign(rows: PyTree) -> PyTree:
    """The rows, each with its largest entry positive.

    An eigenvector has no sign of its own, and a batched solver may choose another.
    """

    def one(row: PyTree) -> PyTree:
        most = lambda by: jnp.asarray(
            optax.tree.max(jax.tree.map(lambda x: by * x, row))
        )
        sign = jnp.where(most(1) < most(-1), -1, 1)
        return jax.tree.map(lambda x: sign.astype(x.dtype) * x, row)

    return jax.vmap(one)(rows)
