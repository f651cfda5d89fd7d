"""The top eigenspace of the preconditioned Hessian, carried along in a flow's state."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.curvature import preconditioned_eigenpairs
from rodjax.linalg import flatten, orthonormal
from rodjax.optimizer import Dynamics, State, coordinate_thresholds

# Rate per step at which directions turn, in units of the eigenvalues of P^-1 H, and at
# which they are brought back to unit length: twice an edge of 2, within Heun's reach.
RATE = 2.0
# Largest threshold of a coordinate that is told from an infinite one: float32 holds the
# square of its inverse.
STEEPEST = 1e15


class Tracked(NamedTuple):
    """The tracked directions and what the Hessian makes of them.

    - `directions`: [k, d], rows U with U P U^T = I.
    - `images`: [k, d], H U. `curvature`: [k, k], U H U^T.
    - `rate`: [k, d], dU/dt of the carried directions.
    """

    directions: Float[Array, "k d"]
    images: Float[Array, "k d"]
    curvature: Float[Array, "k k"]
    rate: Float[Array, "k d"]


def turn(
    curve: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    inverse: Float[Array, " d"],
    carried: Float[Array, "k d"],
) -> Tracked:
    """One look at the Hessian `curve`: k products, for its use and for the tracking.

    Subspace iteration in continuous time (Oja's flow), rotating inside too, towards
    eigenvectors of descending eigenvalues: with A = U H U^T and P^-1 = diag(inverse),
    du_i/dt = rate (P^-1 H u_i - A_ii u_i - 2 sum_{j<i} A_ij u_j).
    """
    u = orthonormal(carried, 1.0 / inverse)
    images = jax.vmap(curve)(u)
    curvature = images @ u.T
    curvature = 0.5 * (curvature + curvature.T)
    kept = 2.0 * jnp.tril(curvature, -1) + jnp.diag(jnp.diag(curvature))
    outside = inverse[None] * images - kept @ u
    return Tracked(u, images, curvature, RATE * (outside + (u - carried)))


def top_directions(
    dynamics: Dynamics, state: State, count: int, *, lr: PyTree
) -> Float[Array, "k d"]:
    """The `count` top eigenvectors of P^-1 H at `state` as rows; fewer if d is less."""
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
    return with_sign(flatten(vectors))


def with_sign(rows: Float[Array, "k d"]) -> Float[Array, "k d"]:
    """The rows, each with its largest entry positive.

    An eigenvector has no sign of its own, and a batched solver may choose another.
    """
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), 1)[:, None], 1)
    return rows * jnp.sign(largest)
