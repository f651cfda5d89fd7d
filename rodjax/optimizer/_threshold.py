"""The stability threshold of an optimizer, once it has settled or as it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._clipping import let_through
from rodjax.optimizer._dynamics import Dynamics
from rodjax.optimizer._linear import at_rest, linear_of, linearize, mixing
from rodjax.optimizer._same import compiled
from rodjax.optimizer._stability import Edges, edges_of, over_share
from rodjax.optimizer._state import LATE, State, at_step

# Steps without a gradient in which whatever averages over time has settled.
SETTLED = 10_000
# Of the largest eigenvalue: what is smaller is gone in a step.
RESIDUE = 1e-2
# Of the update that other coordinates may have a part in.
APART = 1e-3
NOT_APART = (
    "the coordinates of this optimizer have no thresholds of their own: its update has "
    "no derivative at zero gradient, or mixes coordinates, as trust ratios, "
    "orthogonalized updates and averaged parameters do"
)


def threshold(
    dynamics: Dynamics,
    params: PyTree,
    *,
    lr: PyTree = None,
    step: ArrayLike | None = None,
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
    over the coordinates if they differ.

    **Arguments**

    - `params`: the parameters.
    - `lr`: the learning rate, if `dynamics` takes one.
    - `step`: reads schedules at this optimizer step, and counts what clips the
      gradient that the loss has at `params`, as that lowers the step and so raises the
      threshold. `None`: a schedule is read at its end, and nothing is clipped. Bias
      corrections have died out in both, since they belong to the preconditioner.

    **Raises** `ValueError` where coordinates have no thresholds of their own: the
    update has no derivative at zero gradient, or mixes coordinates (trust ratios,
    orthogonalized updates, averages that the gradient is not taken at); or if `step` is
    negative. NaN instead if `lr`, `step` or `params` are traced.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: jnp.sum(w**2)
    >>> momentum = rj.dynamics(optax.sgd(0.1, momentum=0.5), loss)
    >>> float(rj.threshold(momentum, jnp.ones(3)).round(6))
    30.0
    >>> warmup = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)
    >>> scheduled = rj.dynamics(optax.sgd(warmup), loss)
    >>> [round(float(rj.threshold(scheduled, jnp.ones(3), step=s))) for s in (50, 100)]
    [40, 20]

    ```
    """
    return first_edge(dynamics, params, lr=lr, step=step).curvature


def first_edge(
    dynamics: Dynamics,
    params: PyTree,
    *,
    lr: PyTree = None,
    step: ArrayLike | None = None,
) -> Edges:
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
    if step is not None and not isinstance(step, Tracer) and np.less(step, 0):
        raise ValueError(f"step must be at least 0, got {step}")
    lr = dynamics.cast(params, lr=lr)
    if step is not None:
        step = jnp.asarray(step)
    edge, mixed = _first_edge(dynamics, jax.tree.map(jnp.asarray, params), lr, step)
    # Written so that NaN is no agreement.
    separate = mixed < APART
    if isinstance(mixed, Tracer):
        return jax.tree.map(lambda x: jnp.where(separate, x, jnp.nan), edge)
    if not separate:
        raise ValueError(NOT_APART)
    return edge


@compiled
def _first_edge(
    dynamics: Dynamics, params: PyTree, lr: PyTree, step: Array | None
) -> tuple[Edges, Array]:
    state = unit_preconditioner(dynamics, dynamics.init(params, lr=lr), lr=lr)
    if step is not None:
        state = at_step(state, step)
    rest = at_rest(dynamics, state, lr=lr)
    linear = linear_of(rest)
    curvature, angle = edges_of(linear)
    if step is not None and dynamics.clips(params, lr=lr):
        grad = jax.grad(dynamics.loss)(params)
        curvature = over_share(
            curvature, let_through(dynamics, rest, linear, grad, lr=lr)
        )
    first = _least(curvature)
    theirs = lambda c, a: jnp.where(c == first, a, jnp.inf)
    turn = _least(jax.tree.map(theirs, curvature, angle))
    edge = Edges(first, jnp.where(jnp.isnan(first), jnp.nan, turn))
    return edge, mixing(rest, linear, state.slow)


def _least(tree: PyTree) -> Array:
    """Leaf by leaf, which may be sharded over devices, and may be empty."""
    parts = [jnp.min(x, initial=jnp.inf) for x in jax.tree.leaves(tree)]
    return jnp.min(jnp.stack(parts))


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
    edge = edges_of(linear).curvature
    maps = jax.tree.leaves(linear.at(jax.tree.map(lambda e: ratio * e, edge)))[0]
    first = maps[(0,) * (maps.ndim - 2)]
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
