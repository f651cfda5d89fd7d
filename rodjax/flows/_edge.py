"""The edge flow: centre, direction and radius of one oscillation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.flows._flow import Floor, Flow, centre_of, floor_size, shift, stack
from rodjax.flows._scope import warn_of_period
from rodjax.linalg import dot, random_direction
from rodjax.optimizer import Dynamics, State, Window, alternating


class EdgeState(NamedTuple):
    """State of the edge flow.

    - `mean`: the optimizer state at the centre.
    - `direction`: a unit vector u, structured as the phase.
    - `radius`: r, [], pushed out below the floor: z[t] = c + (-1)^t r u.
    """

    mean: State
    direction: PyTree
    radius: Float[Array, ""]


def edge(dynamics: Dynamics, *, floor: Floor = None) -> Flow:
    r"""The edge flow of gradient descent, and of any optimizer.

    For gradient descent as published, with the constants (reconstructed): centre c,
    unit direction u, radius r, Hessian H at c,

    $$\dot c = -\tfrac\eta2 [g(c + ru) + g(c - ru)], \quad
      \dot u = \eta [H u - (u \cdot H u) u], \quad
      \dot r = (\eta\, u \cdot H u - 2)\, r .$$

    u turns into the top eigenvector, and r grows exactly while the sharpness is above
    $2/\eta$: on average it is there, but r does not feel how the loss flattens along u,
    so that nothing damps the swings where the eigenvectors are fixed. Two gradients and
    one Hessian-vector product a call. Source: Marion, arXiv 2606.18080.

    For other optimizers (ours) z, the phase, takes the place of w, and $M = -\Phi'(c)$,
    the linearized update map, that of $\eta H - I$: $\dot c = \tfrac12 (F_+ + F_-)$,
    $\dot u = M u - (u \cdot M u) u$, $\dot r = (u \cdot M u - 1)\, r$.

    **Arguments**

    - `floor`: least radius relative to the norm of the parameters; the dtype's epsilon
      if `None`; or a function of `lr`, as for `modulated`.

    **Starting points.** u and r are the alternating part of a window and its size; from
    scratch a random direction and the floor.

    **Raises** `ValueError` if `floor` is negative. Warns as `modulated` does.

    Memory of `integrate`, beyond the gradient's own: 10 copies of the parameters
    without momentum, 23 with Adam.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> path = rj.integrate(rj.flows.edge(sgd), valley.params, steps=3000, every=10)
    >>> bool(abs(path.params["y"].mean() - 2 / 0.3) < 0.05)
    True

    ```
    """
    least = floor_size(floor)

    def vector_field(t, y: EdgeState, lr: PyTree) -> EdgeState:
        unit = _unit(y.direction)
        rod = optax.tree.scale(y.radius, unit)
        plus = dynamics.increment(shift(y.mean, rod), lr=lr)
        minus = dynamics.increment(shift(y.mean, rod, -1.0), lr=lr)
        _, change = jax.jvp(
            lambda phase: dynamics.increment(y.mean._replace(phase=phase), lr=lr).phase,
            (y.mean.phase,),
            (optax.tree.cast_like(unit, y.mean.phase),),
        )
        # The root of a second moment that is and stays zero has no derivative.
        change = jax.tree.map(lambda x: jnp.where(jnp.isnan(x), 0.0, x), change)
        # M u = -(u + F' u), and M u - (u . M u) u leaves the first u out.
        turned = optax.tree.scale(-1.0, change)
        growth = dot(unit, turned)
        short = jnp.maximum(least(y.mean.params, lr) - y.radius, 0.0)
        return EdgeState(
            mean=jax.tree.map(lambda p, m: 0.5 * (p + m), plus, minus),
            direction=jax.tree.map(
                lambda m, u, d: m - growth * u + (u - d), turned, unit, y.direction
            ),
            radius=2.0 * short + (growth - 2.0) * y.radius,
        )

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> EdgeState:
        mean = centre_of(dynamics, start, lr=lr)
        warn_of_period(dynamics, mean.params, "the edge flow", lr=lr)
        apart = (
            alternating(start).phase
            if isinstance(start, Window)
            else optax.tree.zeros_like(mean.phase)
        )
        # The iterates' own part may be rounding: all directions take part.
        noise = _unit(random_direction(key, mean.params))
        apart = (
            optax.tree.add_scale(apart[0], least(mean.params, lr), noise),
            *apart[1:],
        )
        radius = optax.tree.norm(apart)
        # Without a floor, or at zero, there is no radius yet but a direction.
        drawn = (noise, *optax.tree.zeros_like(apart[1:]))
        direction = optax.tree.where(radius > 0, apart, drawn)
        return EdgeState(mean, _unit(direction), radius)

    def observe(y: EdgeState, *, lr: PyTree) -> tuple[PyTree, dict[str, Array]]:
        rod = optax.tree.scale(y.radius, _unit(y.direction))
        ends = shift(y.mean, rod).params, shift(y.mean, rod, -1.0).params
        return stack(*ends), {}

    return Flow(
        init=init,
        vector_field=vector_field,
        observe=observe,
        dynamics=dynamics,
        evaluations=2,
        products=1,
    )


def _unit(tree: PyTree) -> PyTree:
    norm = optax.tree.norm(tree)
    return optax.tree.scale(1.0 / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny), tree)
