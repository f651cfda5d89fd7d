"""When does any optimizer become unstable? Linear stability of its update map."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._crossing import crossing
from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._linear import LinearMap, at_rest, linear_of, linearize, mixing
from rodjax.optimizer._same import compiled
from rodjax.optimizer._state import LATE, State

# Steps without a gradient in which whatever averages over time has settled.
SETTLED = 10_000
# Of the largest eigenvalue: what is smaller is gone in a step.
RESIDUE = 1e-2
# Of the update that other coordinates may have a part in.
APART = 1e-3


class Edges(NamedTuple):
    """Where each coordinate alone would lose its stability.

    - `curvature`: a pytree like the parameters; infinite where curvature does nothing.
    - `angle`: likewise, in (0, pi]: what it loses it to turns by so much a step, with
      the period 2 pi / angle. pi is an oscillation of period two, and what stands where
      no curvature does it.
    """

    curvature: PyTree
    angle: PyTree


def coordinate_edges(dynamics: Dynamics, state: State, *, lr: PyTree = None) -> Edges:
    r"""The curvature at which each coordinate alone becomes unstable, and to what.

    The least curvature $\lambda > 0$ at which $\partial\Phi/\partial z$ has an
    eigenvalue $e^{i\omega}$ on the unit circle, $0 < \omega \le \pi$. Gradient
    descent, momentum and Adam lose stability at $\omega = \pi$, two or more filters of
    the gradient in a row at other angles (Lee, Lee, arXiv 2608.18415); the flows that
    oscillate do so with period two.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> filters = optax.chain(optax.trace(0.5), optax.trace(0.5), optax.sgd(0.05))
    >>> twice = rj.dynamics(filters, lambda w: jnp.sum(w**2))
    >>> edges = rj.optimizer.coordinate_edges(twice, twice.init(jnp.zeros(1)))
    >>> [round(float(x[0]), 4) for x in edges]  # alternating only from 90 on
    [15.0, 1.0472]

    ```
    """
    return _edges(linearize(dynamics, state, lr=lr))


def _edges(linear: LinearMap) -> Edges:
    each = jnp.vectorize(crossing, signature="(n,n),(n)->(),()")
    found = jax.tree.map(each, linear.free, linear.response)
    outer, inner = map(jax.tree.structure, (linear.free, (0, 0)))
    return Edges(*jax.tree.transpose(outer, inner, found))


def coordinate_thresholds(
    dynamics: Dynamics, state: State, *, lr: PyTree = None
) -> PyTree:
    r"""The curvature at which each coordinate alone would become unstable.

    Those of `coordinate_edges`. For a diagonal preconditioner P it is the stability
    threshold times P, so with D the diagonal matrix of these values the optimizer is at
    its edge exactly when $\lambda_{\max}(D^{-1/2} H D^{-1/2}) = 1$: this ratio is the
    preconditioned sharpness over its threshold, for any such optimizer and without
    knowing P.

    Returns a pytree like the parameters; infinite where curvature has no effect.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(w**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> rj.coordinate_thresholds(sgd, state).round(6).tolist()
    [20.0, 20.0]

    ```
    """
    return coordinate_edges(dynamics, state, lr=lr).curvature


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
    return first.reshape(-1)[0]


def threshold(
    dynamics: Dynamics, params: PyTree, *, lr: PyTree = None
) -> Float[Array, ""]:
    r"""The stability threshold of an optimizer on its preconditioned sharpness.

    The least curvature at which the update map on a one-dimensional quadratic has an
    eigenvalue on the unit circle, with the second moments at one and all that averages
    over time settled. With beta = momentum (Optax's trace is not averaged):

    - GD, RMSProp: $2/\eta$; heavy ball: $(2+2\beta)/\eta$;
      Nesterov: $(2+2\beta)/((1+2\beta)\eta)$;
    - Adam: $(2/\eta)(1+\beta_1)/(1-\beta_1)$;
      NAdam: $(2/\eta)(1+\beta_1)/((1-\beta_1)(1+2\beta_1))$

    (Cohen et al., arXiv 2103.00065 for momentum, 2207.14484 for Adam). The smallest
    over the coordinates if they differ. A schedule is read at its end.

    **Raises** `ValueError` where coordinates have no thresholds of their own: the
    update has no derivative at zero gradient, or mixes coordinates (trust ratios,
    orthogonalized updates, averages that the gradient is not taken at). NaN instead if
    `lr` or `params` are traced.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: jnp.sum(w**2)
    >>> momentum = rj.dynamics(optax.sgd(0.1, momentum=0.5), loss)
    >>> float(rj.threshold(momentum, jnp.ones(3)).round(6))
    30.0

    ```
    """
    return first_edge(dynamics, params, lr=lr).curvature


def first_edge(dynamics: Dynamics, params: PyTree, *, lr: PyTree = None) -> Edges:
    """`threshold`, and the angle at which stability is lost there; each [].

    An angle other than pi is an oscillation of another period than two, 2 pi / angle,
    which the flows that oscillate do not model: rod, modulated and edge warn of it
    (`rodjax.flows.PeriodWarning`), central and covariance serve no such optimizer.

    **Raises** `ValueError` as `threshold` does.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> filters = optax.chain(optax.trace(0.5), optax.trace(0.5), optax.sgd(0.05))
    >>> twice = rj.dynamics(filters, lambda w: jnp.sum(w**2))
    >>> edge = rj.optimizer.first_edge(twice, jnp.ones(3))
    >>> round(float(2 * jnp.pi / edge.angle), 4)  # the period, in steps
    6.0

    ```
    """
    lr = dynamics.cast(params, lr=lr)
    edge, mixed = _first_edge(dynamics, jax.tree.map(jnp.asarray, params), lr)
    # Written so that NaN is no agreement.
    separate = mixed < APART
    if isinstance(mixed, Tracer):
        return jax.tree.map(lambda x: jnp.where(separate, x, jnp.nan), edge)
    if not separate:
        raise ValueError(
            "the coordinates of this optimizer have no thresholds of their own: its "
            "update has no derivative at zero gradient, or mixes coordinates, as trust "
            "ratios, orthogonalized updates and averaged parameters do"
        )
    return edge


@compiled
def _first_edge(dynamics: Dynamics, params: PyTree, lr: PyTree) -> tuple[Edges, Array]:
    state = unit_preconditioner(dynamics, dynamics.init(params, lr=lr), lr=lr)
    rest = at_rest(dynamics, state, lr=lr)
    linear = linear_of(rest)
    flat = lambda tree: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])
    curvatures, angles = map(flat, _edges(linear))
    first = jnp.argmin(curvatures)
    edge = Edges(curvatures[first], angles[first])
    return edge, mixing(rest, linear, state.slow)


def unit_preconditioner(
    dynamics: Dynamics, state: State, *, lr: PyTree = None
) -> State:
    """`state` with second moments at one, once all that averages over time settled.

    Counters are far on, where bias corrections have died out, and what else no gradient
    moves has taken 10,000 steps from there.
    """
    state = state._replace(
        slow=optax.tree.ones_like(state.slow),
        clock=optax.tree.full_like(state.clock, LATE),
    )
    if not jax.tree.leaves(state.rest):
        return state
    no_grad = optax.tree.zeros_like(state.params)

    def one(_, carry):
        rest, clock = carry
        at = state._replace(rest=rest, clock=clock)
        after = dynamics.respond(at, no_grad, lr=lr)
        return after.rest, after.clock

    carry = (state.rest, state.clock)
    rest, clock = jax.lax.fori_loop(0, SETTLED, one, carry)
    return state._replace(rest=rest, clock=clock)


def alternating_multiplier(
    dynamics: Dynamics,
    state: State,
    ratio: Float[Array, ""] | float,
    *,
    lr: PyTree = None,
) -> Array:
    """The complex factor by which the mode at `ratio` of its threshold is multiplied.

    Of the eigenvalues of the linear map of the first coordinate with unit
    preconditioner, at `ratio` times its threshold, the one nearest to alternating.
    Momentum makes it a complex pair of modulus sqrt(beta) below the threshold.
    """
    state = unit_preconditioner(dynamics, state, lr=lr)
    linear = linearize(dynamics, state, lr=lr)
    edge = _edges(linear).curvature
    maps = jax.tree.leaves(linear.at(jax.tree.map(lambda e: ratio * e, edge)))[0]
    first = maps.reshape(-1, *maps.shape[-2:])[0]
    if first.shape[-1] > 2:
        values = jnp.linalg.eigvals(first)
        sizes = jnp.abs(values)
        # A slot that holds the last gradient alone has eigenvalues that are rounding.
        lasting = sizes > RESIDUE * jnp.max(sizes)
        cosines = jnp.real(values) / jnp.where(lasting, sizes, 1.0)
        return values[jnp.argmin(jnp.where(lasting, cosines, jnp.inf))]
    # In closed form where possible: TPUs have no nonsymmetric eigensolver.
    half, det = 0.5 * jnp.trace(first), jnp.linalg.det(first)
    if first.shape[-1] == 1:
        return jax.lax.complex(det, jnp.zeros_like(det))
    square = half**2 - det
    root = jnp.sqrt(jnp.abs(square))
    zero = jnp.zeros_like(root)
    return jnp.where(
        square < 0,
        jax.lax.complex(half, root),
        jax.lax.complex(half - root, zero),
    )
