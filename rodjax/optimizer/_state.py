"""The whole state of an optimizer, in parts that flows treat each in their own way."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, PyTree

from rodjax.optimizer._given import fitted

#: A step count at which bias corrections have died out.
LATE = 10**8


class State(NamedTuple):
    """The whole state of an optimizer, in four parts of one tree structure.

    Every part has the structure `(params, optax_state)` with `None` where a leaf
    belongs to another part, so `equinox.combine(*state)` is the whole. Which part a
    leaf belongs to is found by showing the optimizer a gradient and its opposite.

    - `phase`: what may flip sign every step: parameters, and whatever changes its sign
      with the gradient (first moments).
    - `slow`: what changes with the gradient but not with its sign (second moments).
    - `clock`: step counters. Integers, as Optax counts, in a run; floats in a flow,
      which advances them by fractions.
    - `rest`: what no gradient changes and does not count steps: injected
      hyperparameters, flags, constants.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> adam = rj.dynamics(optax.adam(0.1), lambda w: jnp.sum(w**2))
    >>> state = adam.init(jnp.array([1.0, -2.0]))
    >>> params, (moments, _) = rj.optimizer.merge(adam.update(state))
    >>> bool(jnp.allclose(params, jnp.array([0.9, -1.9]))), float(moments.count)
    (True, 1.0)
    >>> state.phase[1][0].nu is None  # for it is a part of state.slow
    True

    ```
    """

    phase: PyTree
    slow: PyTree
    clock: PyTree
    rest: PyTree

    @property
    def params(self) -> PyTree:
        """The parameters, as the user's pytree."""
        return self.phase[0]

    @classmethod
    def of(
        cls, dynamics: Any, params: PyTree, opt_state: PyTree, *, lr: PyTree = None
    ) -> "State":
        """The state that a training loop or a checkpoint holds, split as `dynamics` is.

        **Arguments**

        - `dynamics`: from `rodjax.dynamics`, of the same optimizer.
        - `params`: the parameters as its loss takes them.
        - `opt_state`: the state of the Optax optimizer on them: plain, that of
          `flax.training.train_state.TrainState` or `flax.nnx.Optimizer`, or the dicts
          and lists that a checkpoint gives back in its place. Counters and floats are
          cast to the dtypes that the optimizer keeps.
        - `lr`: the learning rate, if `dynamics` takes one.

        **Raises** `ValueError` that names the leaf, if `opt_state` is not that of this
        optimizer on these parameters.

        ```python
        >>> import jax.numpy as jnp, optax, rodjax as rj
        >>> loss, optimizer = lambda w: jnp.sum(w**2), optax.adam(0.1)
        >>> params = jnp.array([1.0, -2.0])
        >>> opt_state = optimizer.init(params)
        >>> state = rj.State.of(rj.dynamics(optimizer, loss), params, opt_state)
        >>> int(state.clock[1][0].count)
        0

        ```
        """
        params = jax.tree.map(jnp.asarray, params)
        # Of shapes alone; the optimizer is tried out once for them.
        like = jax.eval_shape(lambda p: dynamics.init(p, lr=lr), params)
        state = fitted(opt_state, merge(like)[1], "opt_state")
        return split_like((params, state), like)


def merge(state: State) -> tuple[PyTree, PyTree]:
    """`(params, optax_state)` of a split state."""
    return eqx.combine(*state)


def split_like(tree: PyTree, state: State) -> State:
    """Split `tree`, of structure `(params, optax_state)`, the way `state` is split."""
    holes = lambda part: jax.tree.map(
        lambda leaf: leaf is not None, part, is_leaf=lambda leaf: leaf is None
    )
    return State(*(eqx.filter(tree, holes(part)) for part in state))


def widest(tree: PyTree) -> jnp.dtype:
    """The widest floating dtype of a tree, single precision at least."""
    dtypes = [x.dtype for x in jax.tree.leaves(tree)]
    floats = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: jnp.finfo(d).bits)


def in_floats(state: State) -> State:
    """Counters and flags as floats."""
    dtype = widest(state.params)
    # Not by `isdtype`, which knows no random keys.
    kinds = jnp.integer, jnp.bool
    discrete = lambda x: any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    return jax.tree.map(lambda x: jnp.astype(x, dtype) if discrete(x) else x, state)


def in_singles(state: State) -> State:
    """Floats narrower than single precision in that."""

    def wide(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.astype(x, widest(x))

    return jax.tree.map(wide, state)


def as_optax(state: State, dtypes: tuple[Any, ...]) -> State:
    """Flags and integers as Optax has them; counters may stay between two steps."""
    structure = jax.tree.structure(merge(state))
    wanted = split_like(jax.tree.unflatten(structure, dtypes), state)

    def back(x: Array, dtype: Any) -> Array:
        if x.dtype == dtype or jnp.issubdtype(dtype, jnp.floating):
            return x
        flag = jnp.issubdtype(dtype, jnp.bool)
        return jnp.astype(x > 0.5 if flag else jnp.round(x), dtype)

    return state._replace(rest=jax.tree.map(back, state.rest, wanted.rest))


def at_step(state: State, step: Array) -> State:
    """`state` with its schedules at `step`.

    A counter that stands beside moments counts their bias correction, and stays.
    """
    own = {path for path, _ in tree_leaves_with_path(state.params)}
    moments = [
        path
        for part in (state.phase, state.slow)
        for path, _ in tree_leaves_with_path(part[1])
    ]
    mirrors = lambda path, near: (
        path[: len(near)] == near and path[len(near) + 1 :] in own
    )

    def moved(path: tuple[Any, ...], x: Array) -> Array:
        corrects = any(mirrors(moment, path[:-1]) for moment in moments)
        return x if corrects else jnp.full_like(x, step)

    optax_clock = jax.tree_util.tree_map_with_path(moved, state.clock[1])
    return state._replace(clock=(state.clock[0], optax_clock))


def has_momentum(state: State) -> bool:
    """Whether the phase holds more than the parameters themselves."""
    return bool(jax.tree.leaves(state.phase[1]))


def slots_of(state: State) -> list[list[int]]:
    """Which leaves of the phase are of each leaf of the parameters; itself first.

    A first moment is that of the parameter whose path its own ends with, the longest
    such path, and whose shape it has: wrappers that hold moments of a part of the
    parameters, one for each label, are met so too.
    """
    params = tree_leaves_with_path(state.params)
    slots = [[i] for i in range(len(params))]
    for k, (path, x) in enumerate(tree_leaves_with_path(state.phase[1])):
        homes = [
            (len(own), i)
            for i, (own, w) in enumerate(params)
            if path[len(path) - len(own) :] == own and w.shape == x.shape
        ]
        if not homes:
            raise ValueError(
                f"the optimizer's state{keystr(path)}, of shape {x.shape}, is a first "
                "moment that mirrors no parameter, so that no coordinate has a "
                "threshold of its own"
            )
        slots[max(homes)[1]].append(len(params) + k)
    return slots
