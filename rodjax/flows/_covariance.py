"""The covariance flow: gradient descent on a free energy, with linear response."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from rodjax.curvature import third_derivative
from rodjax.flows._flow import Floor, Flow, floor_size
from rodjax.flows._scope import gradient_descent_start
from rodjax.linalg import cubature
from rodjax.optimizer import (
    Dynamics,
    State,
    Window,
    alternating,
    for_loops,
    learning_rate,
)


class CovarianceState(NamedTuple):
    """State of the covariance flow.

    - `mean`: the optimizer state at the centre.
    - `factor`: V, parameters with a leading axis r: Sigma = sum of v_i v_i^T.
    """

    mean: State
    factor: PyTree


def covariance(dynamics: Dynamics, *, rank: int = 3, floor: Floor = None) -> Flow:
    r"""The covariance flow of gradient descent (reconstructed).

    With the free energy $F(w, \Sigma) = L(w) + \tfrac12 \langle H(w), \Sigma \rangle$,

    $$\dot w = -\eta \nabla_w F, \qquad
      \dot\Sigma = -\eta (H \Sigma + \Sigma H) + \eta^2 H \Sigma H ,$$

    on $\Sigma = V V^T$ of low rank by $\dot V = -\eta H V + \tfrac{\eta^2}{2} H^2 V$,
    which is the same where Sigma commutes with H, as it comes to, and otherwise adds
    $\tfrac{\eta^2}{2} [H, [H, \Sigma]]$. (A projection to low rank would divide by
    columns that all turn into the same eigenvector.) It is the bundle of rods without
    their drift and with linear response: the oscillation does not feel how the loss
    flattens along it, and where it does not move the centre along itself nothing damps
    its swings.
    Source: Chodron de Courcel, arXiv 2606.05326, after its description.

    **Arguments**

    - `rank`: columns r of V (at most as many as there are parameters).
    - `floor`: least length of a column, relative to the norm of the parameters; the
      dtype's epsilon if `None`; or a function of `lr`, as for `modulated`. Below it a
      column is pushed out along itself.

    **Starting points.** Columns at random, of that length; from a window the first
    is its alternating part.

    **Raises** `ValueError` if `rank` is below 1 or `floor` negative, and from `init`
    for any optimizer but gradient descent.

    Memory of `integrate`, beyond the gradient's own: 29 copies of the parameters,
    with the default `rank`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> flow = rj.flows.covariance(sgd, rank=1)
    >>> path = rj.integrate(flow, valley.params, steps=3000, every=10)
    >>> bool(abs(path.params["y"].mean() - 2 / 0.3) < 0.05)
    True

    ```
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    least = floor_size(floor)

    def vector_field(t, y: CovarianceState, lr: PyTree) -> CovarianceState:
        params = y.mean.params
        rate = learning_rate(dynamics, y.mean, lr=lr)
        field = dynamics.increment(y.mean, lr=lr)
        # Sum of T[v, v], the gradient of <H, Sigma>.
        bends = jax.vmap(lambda v: third_derivative(dynamics.loss, params, v, v))(
            y.factor
        )
        pull = jax.tree.map(lambda b: jnp.sum(b, 0), bends)
        moved = optax.tree.add_scale(field.params, -0.5 * rate, pull)
        _, curve = jax.linearize(for_loops(jax.grad(dynamics.loss)), params)

        def grow(v: PyTree) -> PyTree:
            once = curve(v)
            length = jnp.maximum(optax.tree.norm(v), jnp.finfo(rate.dtype).tiny)
            push = 2.0 * jnp.maximum(least(params, lr) / length - 1.0, 0.0)
            mix = lambda v, h, hh: push * v - rate * h + 0.5 * rate**2 * hh
            return jax.tree.map(mix, v, once, curve(once))

        mean = field._replace(phase=(moved, *field.phase[1:]))
        return CovarianceState(mean, jax.vmap(grow)(y.factor))

    def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> CovarianceState:
        mean = gradient_descent_start(dynamics, start, "covariance", lr=lr)
        flat, unravel = ravel_pytree(mean.params)
        noise = jax.random.normal(key, (min(rank, flat.size), flat.size), flat.dtype)
        rows = noise / jnp.linalg.norm(noise, axis=1, keepdims=True)
        rows = least(mean.params, lr) * rows
        if isinstance(start, Window):
            rows = rows.at[0].add(ravel_pytree(alternating(start).params)[0])
        return CovarianceState(mean, jax.vmap(unravel)(rows))

    return Flow(
        init=init,
        vector_field=vector_field,
        observe=lambda y, *, lr: (cubature(y.mean.params, y.factor), {}),
        dynamics=dynamics,
        evaluations=1,
        products=3 * rank,
    )
