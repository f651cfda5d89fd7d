"""When does any optimizer become unstable? Linear stability of its update map."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._dynamics import Dynamics, State
from rodjax.optimizer._same import compiled

# A step count at which bias corrections have died out.
LATE = 1e8


class LinearMap(NamedTuple):
    """The update map on a quadratic, linearized at rest with a frozen slow state.

    Per coordinate, for each leaf [...] of the parameters, with n the number of slots
    a coordinate has in the phase (itself, its momentum, ...):

    - `free`: [..., n, n], the map without curvature.
    - `response`: [..., n], how the slots answer to a unit gradient.

    With curvature l the map is `free + l * response e_0^T`: affine in l, and so is
    every determinant of it.
    """

    free: PyTree
    response: PyTree

    def at(self, curvature: PyTree) -> PyTree:
        """The map [..., n, n] at these curvatures, one for each coordinate."""
        return jax.tree.map(
            lambda free, response, c: free.at[..., 0].add(c[..., None] * response),
            self.free,
            self.response,
            curvature,
        )


def linearize(dynamics: Dynamics, state: State, *, lr: PyTree = None) -> LinearMap:
    """The linear map of every coordinate at `state`, for curvature along it alone.

    Exact for optimizers that act on each coordinate through a preconditioner that a
    vanishing gradient does not move. NaN where `update` has no derivative at zero
    gradient (trust ratios, orthogonalized updates).
    """
    slots = _slots(state)
    state = _at_rest(dynamics, state, lr=lr)
    no_grad = optax.tree.zeros_like(state.params)

    def respond(phase, grad):
        return dynamics.respond(state._replace(phase=phase), grad, lr=lr).phase

    def column(d_phase, d_grad):
        _, out = jax.jvp(respond, (state.phase, no_grad), (d_phase, d_grad))
        return _gather(out, slots)

    columns = [column(_ones_in(state.phase, slot), no_grad) for slot in slots]
    free = jax.tree.map(lambda *c: jnp.stack(c, -1), *columns)
    still = optax.tree.zeros_like(state.phase)
    return LinearMap(free, column(still, optax.tree.ones_like(state.params)))


def coordinate_thresholds(
    dynamics: Dynamics, state: State, *, lr: PyTree = None
) -> PyTree:
    r"""The curvature at which each coordinate alone would start to alternate.

    The root in $\lambda$ of $\det(\partial\Phi/\partial z + I) = 0$, affine in
    $\lambda$. For a diagonal preconditioner P it is the stability threshold times P,
    so with D the diagonal matrix of these values the optimizer is at its edge exactly
    when $\lambda_{\max}(D^{-1/2} H D^{-1/2}) = 1$: this ratio is the preconditioned
    sharpness over its threshold, for any such optimizer and without knowing P.

    Returns a pytree like the parameters; infinite where curvature has no effect.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(w**2))
    >>> state = sgd.init(jnp.zeros(2))
    >>> rj.coordinate_thresholds(sgd, state).round(6).tolist()
    [20.0, 20.0]

    ```
    """
    free, response = linearize(dynamics, state, lr=lr)

    def root(free, response):
        shifted = free + jnp.eye(len(response), dtype=free.dtype)
        slope = jnp.linalg.det(shifted.at[:, 0].set(response))
        none = slope == 0
        edge = -jnp.linalg.det(shifted) / jnp.where(none, 1.0, slope)
        return jnp.where(none, jnp.inf, edge)

    return jax.tree.map(jnp.vectorize(root, signature="(n,n),(n)->()"), free, response)


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

    The root of $\det(\partial\Phi/\partial z + I) = 0$ on a one-dimensional quadratic,
    with the second moments at one and bias corrections over. With beta = momentum
    (Optax's trace is not averaged):

    - GD, RMSProp: $2/\eta$; heavy ball: $(2+2\beta)/\eta$;
      Nesterov: $(2+2\beta)/((1+2\beta)\eta)$;
    - Adam: $(2/\eta)(1+\beta_1)/(1-\beta_1)$;
      NAdam: $(2/\eta)(1+\beta_1)/((1-\beta_1)(1+2\beta_1))$

    (Cohen et al., arXiv 2103.00065 for momentum, 2207.14484 for Adam). The smallest
    over the coordinates if they differ. A schedule is read at its end.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w: jnp.sum(w**2)
    >>> momentum = rj.dynamics(optax.sgd(0.1, momentum=0.5), loss)
    >>> float(rj.threshold(momentum, jnp.ones(3)).round(6))
    30.0

    ```
    """
    lr = dynamics.cast(params, lr=lr)
    return _threshold(dynamics, jax.tree.map(jnp.asarray, params), lr)


@compiled
def _threshold(dynamics: Dynamics, params: PyTree, lr: PyTree) -> Float[Array, ""]:
    state = unit_preconditioner(dynamics.init(params, lr=lr))
    values = jax.tree.leaves(coordinate_thresholds(dynamics, state, lr=lr))
    return jnp.min(jnp.stack([jnp.min(x) for x in values]))


def unit_preconditioner(state: State) -> State:
    """`state` with second moments at one, long after bias corrections have ended."""
    return state._replace(
        slow=optax.tree.ones_like(state.slow),
        clock=optax.tree.full_like(state.clock, LATE),
    )


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
    state = unit_preconditioner(state)
    edge = coordinate_thresholds(dynamics, state, lr=lr)
    linear = linearize(dynamics, state, lr=lr)
    maps = jax.tree.leaves(linear.at(jax.tree.map(lambda e: ratio * e, edge)))[0]
    first = maps.reshape(-1, *maps.shape[-2:])[0]
    if first.shape[-1] > 2:
        values = jnp.linalg.eigvals(first)
        return values[jnp.argmin(jnp.real(values) / jnp.abs(values))]
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


def has_momentum(state: State) -> bool:
    """Whether the phase holds more than the parameters themselves."""
    return len(_slots(state)) > 1


def _at_rest(dynamics: Dynamics, state: State, *, lr: PyTree) -> State:
    """No momentum, and slow parts that one step without gradient leaves as they were.

    The optimizer moves its second moment before it divides by it; frozen therefore
    means frozen at the value it divides by.
    """
    params = state.params
    slots = _slots(state)[1:]
    # Other leaves, such as injected hyperparameters, are no momentum.
    phase = tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if _inside(path, slots) else x, state.phase
    )
    # A zero second moment has no derivative of its root, and its coordinate no
    # gradient: any tiny value serves whose square, which derivatives contain, is none.
    tiny = lambda s: max(1e-30, 10 * float(jnp.finfo(s.dtype).tiny) ** 0.5)
    slow = jax.tree.map(lambda s: jnp.maximum(s, tiny(s)), state.slow)
    state = State(phase, slow, state.clock)
    after = dynamics.respond(state, optax.tree.zeros_like(params), lr=lr).slow
    slow = jax.tree.map(lambda s, a: jnp.where(a > 0, s * (s / a), s), slow, after)
    return state._replace(slow=slow)


def _slots(state: State) -> list[tuple]:
    """Path prefixes of the copies of the parameters in the phase, themselves first."""
    inside = [path for path, _ in tree_leaves_with_path(state.phase[0])]
    shapes = {path: x.shape for path, x in tree_leaves_with_path(state.phase)}
    own = tree_leaves_with_path(state.phase)[0][0][:1]

    def mirrors(prefix):
        return all(shapes.get(prefix + p) == shapes[own + p] for p in inside)

    depths = {len(p) for p in inside}
    prefixes = (path[: len(path) - n] for path in shapes for n in depths)
    return list(dict.fromkeys(p for p in prefixes if p and mirrors(p)))


def _inside(path: tuple, slots: list[tuple]) -> bool:
    return any(path[: len(slot)] == slot for slot in slots)


def _ones_in(phase: PyTree, slot: tuple) -> PyTree:
    return tree_map_with_path(
        lambda path, x: jnp.full_like(x, float(_inside(path, [slot]))), phase
    )


def _gather(phase: PyTree, slots: list[tuple]) -> PyTree:
    """The slots of every coordinate side by side: params-shaped leaves [..., n]."""
    leaves = dict(tree_leaves_with_path(phase))
    return tree_map_with_path(
        lambda path, _: jnp.stack([leaves[slot + path] for slot in slots], -1),
        phase[0],
    )
