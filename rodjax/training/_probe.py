"""What is found out every n-th step, by products with the Hessian."""

from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from rodjax.curvature import starting_direction
from rodjax.linalg import Eigenpair, refined_eigenpair, unit
from rodjax.optimizer import (
    Dynamics,
    Loss,
    State,
    coordinate_thresholds,
    dynamics,
    for_loops,
)
from rodjax.training._quantities import BATCHES
from rodjax.training._trees import along, like, over, wide

# Of another vector, in what an iteration starts from: it is not trapped by where it is.
ASIDE = 0.1
# Products to begin with, before there is a vector of the last probe.
FIRST = 20


class Curved:
    """A loss at some parameters; linearized once, for all products with its Hessian."""

    def __init__(self, loss: Loss, params: PyTree):
        self.loss, self.params = loss, params

    @cached_property
    def linear(self) -> Any:
        """Its value and gradient, and how they change; first asked for in no loop."""
        return jax.linearize(for_loops(jax.value_and_grad(self.loss)), self.params)

    @property
    def value(self) -> Array:
        return self.linear[0][0]

    @property
    def grad(self) -> PyTree:
        return self.linear[0][1]

    def product(self, vector: PyTree) -> PyTree:
        """H vector, in single precision at least."""
        return wide(self.linear[1](like(vector, self.params))[1])


class Tracked(NamedTuple):
    """A top direction, refined.

    - `numbers`: [there, value, residual], as they are kept.
    - `direction`: whose inner product with a step is that of the mode; unit length,
      zero before the first probe.
    - `overlap`: with what it was before.
    - `top`: the eigenvector.
    - `early`: whether there is no second moment yet.
    """

    numbers: Float[Array, "3"]
    direction: PyTree
    overlap: Float[Array, ""]
    top: PyTree
    early: Bool[Array, ""]


def refined(
    curved: Curved,
    direction: PyTree,
    grad: PyTree,
    products: int,
    root: PyTree | None = None,
) -> tuple[Eigenpair, PyTree]:
    """The pair of D^{-1/2} H D^{-1/2}, D^{-1/2} = `root`, and D^{1/2} times its vector.

    `direction` is the latter of the last time. At first the iteration begins with the
    gradient, much of which is in the directions of largest curvature.
    """
    both = lambda a, b: a if root is None else jax.tree.map(lambda x, y: x * y, a, b)
    inverse = None
    if root is not None:
        safe = lambda r: jnp.where(r > 0, 1 / jnp.where(r > 0, r, 1), 0)
        inverse = jax.tree.map(safe, root)
    before, _ = wide(direction), curved.linear

    downhill = unit(both(wide(grad), root))
    aside = lambda a, b: jax.tree.map(lambda x, y: x + ASIDE * y, a, b)
    fresh = optax.tree.max(jax.tree.map(jnp.abs, before)) == 0
    guess = jax.lax.cond(
        fresh,
        lambda: aside(downhill, unit(starting_direction(before))),
        # Another direction may have become the largest; this one alone stays itself.
        lambda: aside(unit(both(before, inverse)), downhill),
    )
    # What no curvature moves has no part in the direction either.
    product = lambda v: both(curved.product(both(v, root)), root)
    again = lambda _, pair: refined_eigenpair(product, pair.vector, products)
    none = jnp.zeros((), jnp.result_type(*jax.tree.leaves(guess)))
    rounds = jnp.where(fresh, -(-FIRST // products), 1)
    pair = jax.lax.fori_loop(0, rounds, again, Eigenpair(none, guess, none))
    return pair, unit(both(pair.vector, inverse))


def tracked(
    curved: Curved,
    direction: PyTree,
    grad: PyTree,
    products: int,
    dtype: jnp.dtype,
    thresholds: PyTree | None = None,
    early: Array | bool = False,
) -> Tracked:
    """A direction refined by `products` products, of `thresholds` if there are any."""
    root = None if thresholds is None else jax.tree.map(jax.lax.rsqrt, wide(thresholds))
    pair, new = refined(curved, direction, grad, products, root)
    overlap = along(new, direction, dtype)
    # The sign of an eigenvector is nobody's; alternation needs one that stays.
    sign = jnp.where(overlap < 0, -1, 1)
    there = ~jnp.asarray(early)
    new = jax.tree.map(
        lambda x, old: jnp.where(there, sign.astype(x.dtype) * x, 0).astype(old.dtype),
        new,
        direction,
    )
    numbers = jnp.stack([jnp.ones((), dtype), pair.value, pair.residual])
    numbers = jnp.where(there, numbers.astype(dtype), 0)
    overlap = jnp.where(there, jnp.abs(overlap), 0)
    return Tracked(numbers, new, overlap, pair.vector, ~there)


def tracked_ratio(
    optimizer: optax.GradientTransformation,
    curved: Curved,
    inner: PyTree,
    direction: PyTree,
    grad: PyTree,
    products: int,
    dtype: jnp.dtype,
) -> Tracked:
    """Sharpness over the threshold of `optimizer` as it stands, in its own metric."""
    of, state = state_of(optimizer, curved, inner)
    thresholds = coordinate_thresholds(of, state, grad=wide(grad))
    slow = [jnp.any(x != 0) for x in jax.tree.leaves(state.slow)]
    early = ~jnp.any(jnp.stack(slow)) if slow else False
    return tracked(curved, direction, grad, products, dtype, thresholds, early)


def state_of(
    optimizer: optax.GradientTransformation, curved: Curved, inner: PyTree
) -> tuple[Dynamics, State]:
    """The optimizer's state, its moments in single precision at least."""
    params = wide(curved.params)
    narrow = lambda p: curved.loss(like(p, curved.params))
    of = dynamics(optimizer, narrow)
    return of, State.of(of, params, inner)


def blocks(
    curved: Curved,
    vectors: PyTree,
    grad: PyTree,
    groups: dict[str, list[int]],
    products: int,
    dtype: jnp.dtype,
) -> tuple[dict[str, Array], PyTree]:
    """[there, value, residual] of the Hessian's block of each group, and vectors."""
    leaves, structure = jax.tree.flatten(vectors)
    slopes = jax.tree.leaves(grad)
    found = {}
    for name, mine in groups.items():
        part = _Block(curved, mine)
        pair, new = refined(
            part, [leaves[i] for i in mine], [slopes[i] for i in mine], products
        )
        found[name] = jnp.stack([jnp.ones((), dtype), pair.value, pair.residual])
        found[name] = found[name].astype(dtype)
        for i, x in zip(mine, new, strict=True):
            leaves[i] = x.astype(leaves[i].dtype)
    return found, structure.unflatten(leaves)


class _Block(Curved):
    """The Hessian's block of some leaves."""

    def __init__(self, whole: Curved, mine: list[int]):
        self.whole, self.mine, self.linear = whole, mine, whole.linear

    def product(self, vector: list[Array]) -> list[Array]:
        leaves, structure = jax.tree.flatten(self.whole.params)
        full = [jnp.zeros_like(x) for x in leaves]
        for i, x in zip(self.mine, vector, strict=True):
            full[i] = x.astype(full[i].dtype)
        image = jax.tree.leaves(self.whole.product(structure.unflatten(full)))
        return [image[i] for i in self.mine]


def shares(top: PyTree, groups: dict[str, list[int]], dtype: jnp.dtype) -> dict:
    """[there, |v_group|^2] of the unit vector `top`, of each group."""
    leaves = [along(x, x, dtype) for x in jax.tree.leaves(top)]
    whole = jnp.sum(jnp.stack(leaves))
    return {
        name: over(jnp.sum(jnp.stack([leaves[i] for i in mine])), whole)
        for name, mine in groups.items()
    }


def pushed(ring: Array, number: Array) -> Array:
    """[count, ring] with `number`, [there, value], in the place of the oldest."""
    there, value = number
    count = ring[0].astype(jnp.int32)
    longer = ring.at[1 + count % BATCHES].set(value).at[0].add(1)
    return jnp.where(there > 0, longer, ring)
