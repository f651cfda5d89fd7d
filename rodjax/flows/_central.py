"""The central flow: the time average of an oscillation kept at its edge."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.flows._bends import third_derivatives
from rodjax.flows._flow import Flow, moving
from rodjax.flows._scope import preconditioned_start
from rodjax.flows._tracking import STEEPEST, Tracked, top_directions, turn
from rodjax.linalg import (
    Complementary,
    alike,
    combine,
    complementarity,
    cubature,
    dot,
    gram,
    root,
    square_root,
)
from rodjax.optimizer import (
    Dynamics,
    State,
    Window,
    for_loops,
    inverse_preconditioner,
    midpoint,
)

REPORTS: Mapping[str, str] = MappingProxyType(
    {
        "predicted_loss": "time-averaged loss that the central flow predicts",
        "predicted_grad_norm": "root-mean-square gradient that it predicts",
        "complementarity": "residual of its complementarity problem",
    }
)


class CentralState(NamedTuple):
    """State of the central flow.

    - `mean`: the optimizer state at the centre; its second moments are those that the
      next step divides by, after their update.
    - `directions`: U with U P U^T = I along the largest eigenvalues of P^-1 H, pytrees
      like the parameters on a leading axis k.
    """

    mean: State
    directions: PyTree


class _Moment(NamedTuple):
    """What the field and the observation both need at one state."""

    slope: PyTree
    inverse: PyTree
    tracked: Tracked
    bends: PyTree
    answer: Complementary


def central(dynamics: Dynamics, *, rank: int = 3, gamma: float = 4.0) -> Flow:
    r"""The central flow of gradient descent and RMSProp.

    With P the preconditioner, learning rate included (GD: $I/\eta$; RMSProp:
    $\mathrm{diag}(\sqrt\nu + \epsilon)/\eta$), and Sigma the covariance of the
    oscillation,

    $$\dot w = -P^{-1} \big[ g + \tfrac12 \nabla_w \langle \Sigma, H(w) \rangle \big],
      \quad \dot\nu = \tfrac{1-\beta_2}{\beta_2} \big[ \mathbb{E} g^2 - \nu \big],
      \quad \mathbb{E} g^2 = g^2 + \mathrm{diag}(H \Sigma H)$$

    (sums over components for a scalar second moment; any other second moments and
    schedules as the update map says). $\Sigma = U^T X U$ over the `rank` top
    eigenvectors U of $P^{-1}H$, $U P U^T = I$, with X the solution of the semidefinite
    complementarity problem $0 \preceq X$, $0 \preceq A + B[X]$, $\langle X, A + B[X]
    \rangle = 0$, where $A + B[X]$ is $U (2P - H) U^T$ a time $1/\gamma$ later,
    linearized along the flow: eigenvalues enter and leave the edge by themselves.
    Source: Cohen et al., arXiv 2410.24206.

    The directions are part of the state and turn towards the top eigenspace as in a
    continuous-time subspace iteration: no eigenproblem is solved along the way.

    **Arguments**

    - `rank`: eigenpairs tracked (at most as many as there are parameters); more than
      ever are at the edge together.
    - `gamma`: rate per step at which the eigenvalues are held to the edge.

    **Reports** `predicted_loss` $= L + \tfrac12 \langle \Sigma, H \rangle$ and
    `predicted_grad_norm` $= (|g|^2 + \mathrm{tr} H \Sigma H)^{1/2}$, the time averages
    (the second root-mean-square), and `complementarity`, the residual of X (see
    `rodjax.linalg.complementarity`): large where no X holds the edge, as on a
    quadratic.

    **Raises** `ValueError` if `rank` is below 1 or `gamma` not positive, and from
    `init` for optimizers with momentum, weight decay or clipping.

    Memory of `integrate`, beyond the gradient's own: 43 copies of the parameters,
    with the default `rank`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> path = rj.integrate(rj.flows.central(sgd), valley.params, steps=400)
    >>> bool(abs(path.params["y"][-1] - 2 / 0.3) < 0.05)
    True

    ```
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")

    def settle(mean: State, squares: PyTree, lr: PyTree) -> PyTree:
        """d nu/dt when the squared gradients average to `squares`."""
        grad = jax.tree.map(square_root, squares)
        after = dynamics.respond(mean, grad, lr=lr).slow
        # With nu the second moment after its update the rate is that over what is kept.
        none = dynamics.respond(mean, optax.tree.zeros_like(grad), lr=lr).slow
        return jax.tree.map(
            lambda a, n, s: (a - s) * jnp.where(n > 0, s / jnp.where(n > 0, n, 1), 1),
            after,
            none,
            mean.slow,
        )

    def look(y: CentralState, lr: PyTree) -> _Moment:
        mean = y.mean
        slope_of = for_loops(jax.grad(dynamics.loss))

        def inverse_of(slow, clock):
            state = mean._replace(slow=slow, clock=clock)
            inverse = inverse_preconditioner(dynamics, state, lr=lr)
            # A learning rate of zero, as at the start of a warm-up, has no inverse.
            return jax.tree.map(lambda x: jnp.maximum(x, 1.0 / STEEPEST), inverse)

        slope, curve = jax.linearize(slope_of, mean.params)
        inverse = inverse_of(mean.slow, mean.clock)
        tracked = turn(curve, inverse, y.directions)
        u, count = tracked.directions, len(tracked.curvature)
        bends = third_derivatives(slope_of, mean.params, tracked)

        # How the preconditioner drifts without oscillation, and how X moves it.
        ticks = optax.tree.ones_like(mean.clock)

        def preconditioner_rate(d_slow, d_clock):
            _, rate = jax.jvp(inverse_of, (mean.slow, mean.clock), (d_slow, d_clock))
            return jax.tree.map(lambda r, p: -r / p / p, rate, inverse)

        def moved_by(pair):
            # At the edge H u = 2 P u, which makes B symmetric.
            extra = jax.tree.map(lambda x, p: 4.0 * x / p / p, pair, inverse)
            still = optax.tree.ones_like(mean.params)
            rate = lambda e: settle(mean, e, lr)
            _, d_slow = jax.jvp(rate, (still,), (extra,))
            return preconditioner_rate(d_slow, optax.tree.zeros_like(ticks))

        drift = preconditioner_rate(
            settle(mean, jax.tree.map(jnp.square, slope), lr), ticks
        )
        # Linear in time P would fall to zero where, as in a warm-up, it halves or more.
        drift = jax.tree.map(
            lambda d, p: jnp.maximum(d, -0.5 * gamma / p), drift, inverse
        )
        pull = jax.vmap(lambda bend: dot(bend, optax.tree.mul(inverse, slope)))(bends)
        pull = pull.reshape(count, count)
        a = (
            2.0 * jnp.eye(count, dtype=tracked.curvature.dtype)
            - tracked.curvature
            + (2.0 * gram(_times(drift, u), u) + pull) / gamma
        )
        b = 0.5 * gram(_times(inverse, bends), bends)
        if jax.tree.leaves(mean.slow):
            first, second = jnp.divmod(jnp.arange(count**2), count)
            products = jax.tree.map(lambda x: x[first] * x[second], u)
            b = b + 2.0 * gram(products, jax.vmap(moved_by)(products))
        b = b.reshape((count,) * 4) / gamma
        return _Moment(slope, inverse, tracked, bends, complementarity(a, b))

    def vector_field(t, y: CentralState, lr: PyTree) -> CentralState:
        seen = look(y, lr)
        push = combine(seen.answer.x.reshape(1, -1), seen.bends)
        step = jax.tree.map(
            lambda p, g, b: -p * (g + 0.5 * b[0]), seen.inverse, seen.slope, push
        )
        images = seen.tracked.images
        # Positive in exact arithmetic.
        squares = jax.tree.map(
            lambda g, h, xh: jnp.maximum(jnp.square(g) + jnp.sum(h * xh, 0), 0.0),
            *(seen.slope, images, combine(seen.answer.x, images)),
        )
        field = moving(y.mean, step)
        field = field._replace(slow=settle(y.mean, squares, lr))
        rate = jax.vmap(alike, (0, None))(seen.tracked.rate, y.mean.params)
        return CentralState(field, rate)

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> CentralState:
        mean = preconditioned_start(dynamics, start, "central", lr=lr)
        if isinstance(start, Window):
            # The second moment of the step at the window's middle, after its update.
            mean = mean._replace(slow=midpoint(start, ahead=1).slow)
        else:
            mean = mean._replace(slow=dynamics.update(mean, lr=lr).slow)
        return CentralState(mean, top_directions(dynamics, mean, rank, lr=lr))

    def observe(y: CentralState, *, lr: PyTree) -> tuple[PyTree, dict[str, Array]]:
        seen = look(y, lr)
        x, tracked = seen.answer.x, seen.tracked
        rows = combine(root(x).T, tracked.directions)
        power = dot(seen.slope, seen.slope) + jnp.sum(
            x * gram(tracked.images, tracked.images)
        )
        report = {
            "predicted_loss": dynamics.loss(y.mean.params)
            + 0.5 * jnp.sum(x * tracked.curvature),
            "predicted_grad_norm": square_root(jnp.maximum(power, 0.0)),
            "complementarity": seen.answer.residual,
        }
        return cubature(y.mean.params, rows), report

    return Flow(
        init=init,
        vector_field=vector_field,
        observe=observe,
        reports=REPORTS,
        dynamics=dynamics,
        evaluations=1,
        substeps=2,
        products=float("nan"),
    )


def _times(weight: PyTree, rows: PyTree) -> PyTree:
    """Each of the rows times `weight`, coordinate by coordinate."""
    return jax.tree.map(lambda w, x: w[None] * x, weight, rows)
