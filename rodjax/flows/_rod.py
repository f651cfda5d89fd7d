"""The rod flow and the bundle of rods: centre and covariance of the iterates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from rodjax.flows._flow import Flow, half_step_back, shift, stack
from rodjax.flows._scope import warn_of_period
from rodjax.linalg import cubature, random_direction, tangent
from rodjax.optimizer import (
    Dynamics,
    State,
    Window,
    alternating,
    half_step_midpoint,
    has_momentum,
    warm_up,
)

# Size of the columns that start at random, relative to the rod.
SPARE = 1e-3


class RodState(NamedTuple):
    """State of the rod flow.

    - `mean`: the optimizer state at the centre (phase, slow, clock).
    - `extent`: the factor U of Sigma = U U^T, structured as the phase with a leading
      axis r; for the dense oracle Sigma itself, [d, d] on the ravelled phase.
    """

    mean: State
    extent: PyTree | Float[Array, "d d"]


def rod(
    dynamics: Dynamics, *, rank: int = 1, order: int = 2, dense: bool = False
) -> Flow:
    r"""The rod flow of any optimizer; with `rank > 1`, a bundle of rods.

    Consecutive iterates are the ends of a rod with centre $\bar z = (z_t + z_{t+1})/2$
    and extent $\Sigma = \delta\delta^T$, $\delta = (z_{t+1} - z_t)/2$. With F the
    increment of the update map and $F_\pm = F(\bar z \pm \delta)$,

    $$\dot{\bar z} = G = \tfrac12 (F_+ + F_-), \qquad
      \dot\Sigma = \tfrac14 (F_+ F_+^T + F_- F_-^T) - 2\Sigma,$$

    the slow part moving by the mean of its two ends (reconstructed), and the centre
    corrected by backward error analysis, $G - \tfrac12 G' G$, evaluated without
    derivatives as $G(\bar z - G/2)$. For GD this is the rod flow of Regis, Chewi, arXiv
    2602.01480; for momentum and Adam that of arXiv 2605.06821.

    With U the factor of Sigma and M the right-hand side, a projection to rank r keeps
    the field pure: $\dot U = (I - \tfrac12 U C^{-1} U^T) M U C^{-1}$, $C = U^T U$.
    With r rods (ours) the ends are $\bar z \pm \sqrt r U_i$, a cubature rule exact for
    Sigma; $G = s$ their mean increment, $d_i$ the half-differences over $\sqrt r$,
    and $M = \tfrac12 (s s^T + \sum_i d_i d_i^T) - 2\Sigma$.

    A single rod points along the drift before the onset of the edge of stability and
    misses it; three rods catch it, in float64 (float32 leaves the spare columns too
    little room).

    **Arguments**

    - `dynamics`: from `rodjax.dynamics`.
    - `rank`: number of rods r.
    - `order`: 2 for the corrected centre, 1 for G itself, with 2 r evaluations of Phi
      per call in place of 4 r.
    - `dense`: keep all of Sigma, d by d with d the size of the phase, and take its
      `rank` leading directions as rods: an oracle for small problems.

    **Raises** `ValueError` if `rank` is below 1 or `order` not 1 or 2, and from `init`
    if `rank` exceeds the number of entries of the phase, or is above 1 for an optimizer
    with momentum: its map is not normal, and the projected bundle blows up on it;
    `rodjax.flows.modulated` is the flow for several unstable directions there. Warns
    as `modulated` does.

    The centre models the half-step midpoint, at t + 1/2.

    Memory of `integrate`, beyond the gradient's own: 12 copies of the parameters
    without momentum, 23 with Adam (`rank=1`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> well = rj.problems.quartic_well(sharpness=2.5, quartic=1.0, initial=0.3)
    >>> sgd = rj.dynamics(optax.sgd(1.0), well.loss)
    >>> path = rj.integrate(rj.flows.rod(sgd), well.params, steps=60)
    >>> round(float(path.metrics["amplitude"][-1] ** 2), 6)  # S/Q - 2/(eta Q)
    0.5

    ```
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")

    def spread(mean: State, rods: PyTree, lr: PyTree) -> tuple[State, PyTree]:
        """Mean increment of all ends, and the half-differences over sqrt(r)."""
        count = jax.tree.leaves(rods)[0].shape[0]
        step = jax.vmap(
            lambda u, side: dynamics.increment(
                shift(mean, u, side * count**0.5), lr=lr
            ),
            in_axes=(0, None),
        )
        plus, minus = step(rods, 1.0), step(rods, -1.0)
        mean_increment = jax.tree.map(
            lambda p, m: jnp.mean(0.5 * (p + m), 0), plus, minus
        )
        halves = jax.tree.map(
            lambda p, m: (p - m) / (2.0 * count**0.5), plus.phase, minus.phase
        )
        return mean_increment, halves

    def vector_field(t, y: RodState, lr: PyTree) -> RodState:
        rods = _leading(y, rank) if dense else y.extent
        drift, halves = spread(y.mean, rods, lr)
        steps = jax.tree.map(
            lambda s, d: jnp.concatenate([s[None], d]), drift.phase, halves
        )
        # Column j of V is step j: M = V V^T - 2 Sigma.
        columns = jax.tree.map(lambda x: x / 2**0.5, steps)
        if dense:
            flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(columns)
            grow = flat.T @ flat - 2.0 * y.extent
        else:
            grow = tangent(columns, y.extent)
        if order == 2:
            drift, _ = spread(half_step_back(y.mean, drift), rods, lr)
        return RodState(drift, grow)

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> RodState:
        window = start if isinstance(start, Window) else warm_up(dynamics, start, lr=lr)
        mean = dynamics.fluid(half_step_midpoint(window), lr=lr)
        if rank > 1 and not dense and has_momentum(mean):
            raise ValueError(
                f"rank={rank} is refused for an optimizer with momentum: the bundle of "
                "rods is unstable on its non-normal update map. Use "
                "rodjax.flows.modulated, which follows several directions, or rank=1"
            )
        warn_of_period(dynamics, mean.params, "the rod flow", lr=lr)
        size = optax.tree.size(mean.phase)
        if rank > size:
            raise ValueError(f"rank={rank} exceeds the {size} entries of the phase")
        half = jax.tree.map(
            lambda a, b, m: 0.5 * (jnp.astype(b, m.dtype) - jnp.astype(a, m.dtype)),
            *(window.at(0).phase, window.at(1).phase, mean.phase),
        )
        if dense:
            flat = ravel_pytree(half)[0]
            return RodState(mean, jnp.outer(flat, flat))
        # Where the iterates have not begun to alternate, it is the drift that counts.
        flip = jax.tree.map(jnp.negative, alternating(window).phase)
        drift = optax.tree.sub(half, flip)
        columns = [half] if rank == 1 else [drift]
        size = SPARE * optax.tree.norm(half)
        for j, spare in enumerate(jax.random.split(key, rank - 1)):
            noise = random_direction(spare, mean.phase)
            noise = optax.tree.scale(size / optax.tree.norm(noise), noise)
            columns.append(optax.tree.add(noise, flip) if j == 0 else noise)
        return RodState(mean, stack(*columns))

    def observe(y: RodState, *, lr: PyTree) -> tuple[PyTree, dict[str, Array]]:
        rods = _leading(y, rank) if dense else y.extent
        return cubature(y.mean.params, rods[0]), {}

    return Flow(
        init=init,
        vector_field=vector_field,
        observe=observe,
        dynamics=dynamics,
        evaluations=2 * order * rank,
        offset=0.5,
    )


def _leading(y: RodState, rank: int) -> PyTree:
    """The `rank` leading directions of a dense Sigma as a factor."""
    values, vectors = jnp.linalg.eigh(y.extent)
    lengths = jnp.sqrt(jnp.maximum(values[-rank:], 0.0))
    rows = (vectors[:, -rank:] * lengths[None]).T
    return jax.vmap(ravel_pytree(y.mean.phase)[1])(rows)
