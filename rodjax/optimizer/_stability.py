"""When does any optimizer become unstable? Linear stability of its update map."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._clipping import let_through
from rodjax.optimizer._crossing import crossing
from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._linear import LinearMap, at_rest, linear_of, linearize
from rodjax.optimizer._state import State


class Edges(NamedTuple):
    """Where each coordinate alone would lose its stability.

    - `curvature`: a pytree like the parameters; infinite where curvature does nothing.
    - `angle`: likewise, in (0, pi]: what it loses it to turns by so much a step, with
      the period 2 pi / angle. pi is an oscillation of period two, and what stands where
      no curvature does it.
    """

    curvature: PyTree
    angle: PyTree


def coordinate_edges(
    dynamics: Dynamics,
    state: State,
    *,
    lr: PyTree = None,
    grad: PyTree | None = None,
) -> Edges:
    r"""The curvature at which each coordinate alone becomes unstable, and to what.

    The least curvature $\lambda > 0$ at which $\partial\Phi/\partial z$ has an
    eigenvalue $e^{i\omega}$ on the unit circle, $0 < \omega \le \pi$. Gradient
    descent, momentum and Adam lose stability at $\omega = \pi$, two or more filters of
    the gradient in a row at other angles (Lee, Lee, arXiv 2608.18415); the flows that
    oscillate do so with period two.

    `grad` is the gradient that the optimizer is shown, a pytree like the parameters:
    where clipping lets a share of it through, a curvature moves the optimizer by that
    share, and is larger by as much at the edge. `None`: a vanishing one.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> filters = optax.chain(optax.trace(0.5), optax.trace(0.5), optax.sgd(0.05))
    >>> twice = rj.dynamics(filters, lambda w: jnp.sum(w**2))
    >>> edges = rj.optimizer.coordinate_edges(twice, twice.init(jnp.zeros(1)))
    >>> [round(float(x[0]), 4) for x in edges]  # alternating only from 90 on
    [15.0, 1.0472]

    ```
    """
    rest = at_rest(dynamics, state, lr=lr)
    linear = linear_of(rest)
    edges = edges_of(linear)
    if grad is None or not dynamics.clips(state.params, lr=lr):
        return edges
    share = let_through(dynamics, rest, linear, grad, lr=lr)
    return edges._replace(curvature=over_share(edges.curvature, share))


def edges_of(linear: LinearMap) -> Edges:
    each = jnp.vectorize(crossing, signature="(n,n),(n)->(),()")
    found = jax.tree.map(each, linear.free, linear.response)
    outer, inner = map(jax.tree.structure, (linear.free, (0, 0)))
    return Edges(*jax.tree.transpose(outer, inner, found))


def coordinate_thresholds(
    dynamics: Dynamics,
    state: State,
    *,
    lr: PyTree = None,
    grad: PyTree | None = None,
) -> PyTree:
    r"""The curvature at which each coordinate alone would become unstable.

    Those of `coordinate_edges`. For a diagonal preconditioner P it is the stability
    threshold times P, so with D the diagonal matrix of these values the optimizer is at
    its edge exactly when $\lambda_{\max}(D^{-1/2} H D^{-1/2}) = 1$: this ratio is the
    preconditioned sharpness over its threshold, for any such optimizer and without
    knowing P.

    Returns a pytree like the parameters; infinite where curvature has no effect. `grad`
    as in `coordinate_edges`: the gradient that the optimizer is shown, whose clipping
    then counts.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    >>> sgd = rj.dynamics(clipped, lambda w: jnp.sum(w**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> rj.coordinate_thresholds(sgd, state).round(4).tolist()
    [20.0, 20.0]
    >>> grad = jnp.array([3.0, 4.0])  # of which a fifth is let through
    >>> rj.coordinate_thresholds(sgd, state, grad=grad).round(4).tolist()
    [100.0, 100.0]

    ```
    """
    return coordinate_edges(dynamics, state, lr=lr, grad=grad).curvature


def inverse_preconditioner(
    dynamics: Dynamics, state: State, *, lr: PyTree = None
) -> PyTree:
    r"""The diagonal of $P^{-1}$, learning rate included, at frozen second moments.

    An optimizer without momentum takes the step $-P^{-1} g$: $\eta$ for GD,
    $\eta / (\sqrt\nu + \epsilon)$ for RMSProp, with the second moment it divides by
    (the one after its update) as in `state`. A pytree like the parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> rms = rj.dynamics(optax.rmsprop(0.1, eps=0.0), lambda w: jnp.sum(w**2))
    >>> state = rms.init(jnp.zeros(2))
    >>> state = state._replace(slow=optax.tree.full_like(state.slow, 4.0))
    >>> [round(x, 6) for x in rj.optimizer.inverse_preconditioner(rms, state).tolist()]
    [0.05, 0.05]

    ```
    """
    response = linearize(dynamics, state, lr=lr).response
    return jax.tree.map(lambda x: -x[..., 0], response)


def learning_rate(
    dynamics: Dynamics, state: State, *, lr: PyTree = None
) -> Float[Array, ""]:
    """The rate of gradient descent at `state`, whose clock a schedule may read.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(w**2))
    >>> float(rj.optimizer.learning_rate(sgd, sgd.init(jnp.zeros(2))))
    0.1

    ```
    """
    first = jax.tree.leaves(inverse_preconditioner(dynamics, state, lr=lr))[0]
    return first[(0,) * first.ndim]


def over_share(curvature: PyTree, share: PyTree) -> PyTree:
    """What curvature it takes where a share of the gradient is let through."""
    # Nothing that is not let through is unstable.
    return jax.tree.map(
        lambda x, s: jnp.where(s > 0, x / jnp.where(s > 0, s, 1), jnp.inf),
        curvature,
        share,
    )
