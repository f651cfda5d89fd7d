"""The update map of any Optax optimizer, split the way the flows need it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._split import (
    PARTS,
    Kind,
    OptimizerFactory,
    Split,
    split_of,
)
from rodjax.optimizer._trial import update_with

Loss = Callable[[Any], Float[Array, ""]]


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


class InitFn(Protocol):
    """`init(params, *, lr) -> State`."""

    def __call__(self, params: PyTree, *, lr: PyTree = None) -> State: ...


class StepFn(Protocol):
    """`update(state, *, lr) -> State`, and `increment` likewise."""

    def __call__(self, state: State, *, lr: PyTree = None) -> State: ...


class RespondFn(Protocol):
    """`respond(state, grad, *, lr) -> State`."""

    def __call__(self, state: State, grad: PyTree, *, lr: PyTree = None) -> State: ...


class FluidFn(Protocol):
    """`fluid(state, *, lr) -> State`."""

    def __call__(self, state: State, *, lr: PyTree = None) -> State: ...


class CastFn(Protocol):
    """`cast(params, *, lr) -> lr`."""

    def __call__(self, params: PyTree, *, lr: PyTree = None) -> PyTree: ...


class Dynamics(NamedTuple):
    """One optimizer on one loss, as pure functions of a `State`.

    - `init(params, *, lr) -> State`: the state before the first step.
    - `update(state, *, lr) -> State`: the update map Phi, one optimizer step.
    - `increment(state, *, lr) -> State`: F(z) = Phi(z) - z, with the parameters' part
      taken from the optimizer directly so that no digits cancel.
    - `respond(state, grad, *, lr) -> State`: one step that is shown `grad` in place of
      the loss's gradient (how curvature enters is then the caller's choice). Raises
      `ValueError` for an optimizer whose step this does not tell: one that goes by the
      loss itself (Polyak's), or moves only every so many steps.
    - `fluid(state, *, lr) -> State`: the state in floats, as a flow carries it. Raises
      `ValueError` in words where no flow can carry the state of this optimizer.
    - `loss(params)`: the scalar loss.
    - `cast(params, *, lr)`: `lr` as arrays of the parameters' dtype, checked.

    `lr` is whatever the optimizer factory takes, as traced data, or `None` where
    the optimizer was given ready made.
    """

    init: InitFn
    update: StepFn
    increment: StepFn
    respond: RespondFn
    fluid: FluidFn
    loss: Loss
    cast: CastFn


def merge(state: State) -> tuple[PyTree, PyTree]:
    """`(params, optax_state)` of a split state."""
    return eqx.combine(*state)


def split_like(tree: PyTree, state: State) -> State:
    """Split `tree`, of structure `(params, optax_state)`, the way `state` is split."""
    holes = lambda part: jax.tree.map(
        lambda leaf: leaf is not None, part, is_leaf=lambda leaf: leaf is None
    )
    return State(*(eqx.filter(tree, holes(part)) for part in state))


def dynamics(
    optimizer: optax.GradientTransformation | OptimizerFactory,
    loss: Loss,
    *,
    kind: Kind | None = None,
) -> Dynamics:
    r"""The update map Phi of an Optax optimizer on a full-batch loss.

    One step is $g = \nabla L(w)$, $(u, s') = \mathrm{update}(g, s, w)$, $w' = w + u$.
    The optimizer also gets `value`, `grad` and `value_fn` as Optax extra arguments.
    Nothing here or in the flows is written per optimizer: the state is only split
    into phase, slow, clock and rest (see `State`), by trying the optimizer out, once
    for each shape of the parameters, on three steps from parameters at zero.

    **Arguments**

    - `optimizer`: an `optax.GradientTransformation`, or a function from a learning
      rate (or any pytree of hyperparameters) to one, such as `optax.adam` or
      `lambda hp: optax.adam(hp["lr"], b2=hp["b2"])`. With a function, the learning
      rate is data: pass `lr=` to `integrate` and `descend`, under `jax.vmap` too, and
      a whole grid shares one compilation.
    - `loss`: params -> scalar, differentiable.
    - `kind`: optional override of the split, a function `(path, leaf) -> "phase" |
      "slow" | "clock" | "rest" | None` over the leaves of the Optax state (`path` as in
      `jax.tree_util`, `leaf` with a shape and a dtype); `None` keeps what was found.

    **Raises**

    `TypeError` or `ValueError`, from `init`, naming the leaf or argument: parameters
    that are not real floats, a loss that is not a scalar, an `lr` missing or given in
    vain. From `fluid`, and so from every flow, though not from the optimizer's own run:
    a state that no flow can carry (injected noise, flags or integers that change, a
    leaf that is neither odd nor even in the gradient, updates that come only every so
    many steps, a schedule that cannot be read between two steps).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    >>> state = sgd.init(jnp.array([1.0, -2.0]), lr=0.1)
    >>> sgd.update(state, lr=0.1).params.tolist()
    [0.9, -1.8]

    ```
    """
    if isinstance(optimizer, optax.GradientTransformation):
        factory, takes_lr = (lambda _: optimizer), False
    elif callable(optimizer):
        factory, takes_lr = optimizer, True
    else:
        raise TypeError(
            "optimizer must be an optax.GradientTransformation or a function from a "
            f"learning rate to one, such as optax.adam; got {type(optimizer).__name__}"
        )

    def cast(params: PyTree, *, lr: PyTree = None) -> PyTree:
        if takes_lr and lr is None:
            raise ValueError(
                "lr is missing: the optimizer was given as a function of the learning "
                "rate, so pass lr=..."
            )
        if not takes_lr and lr is not None:
            raise ValueError(
                "lr was given but the optimizer already has its learning rate; pass "
                "the optimizer as a function, e.g. dynamics(optax.adam, loss)"
            )
        dtype = _float_dtype(params)
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), lr)

    def init(params: PyTree, *, lr: PyTree = None) -> State:
        lr = cast(params, lr=lr)
        params = jax.tree.map(jnp.asarray, params)
        _check_scalar_loss(loss, params)
        # An explicit dtype also drops weak types, which would retrace a scan.
        strong = lambda x: jnp.asarray(x, jnp.result_type(x))
        whole = jax.tree.map(strong, (params, factory(lr).init(params)))
        parts = split_of(factory, params, lr, kind).parts
        leaves, structure = jax.tree.flatten(whole)
        pairs = list(zip(leaves, parts, strict=True))
        only = lambda part: [x if p == part else None for x, p in pairs]
        return State(*(jax.tree.unflatten(structure, only(part)) for part in PARTS))

    def step(state: State, value: Array, grad: PyTree, lr: PyTree):
        params, old = merge(_as_optax(state, split_of(factory, state.params, lr, kind)))
        updates, new = update_with(factory(lr), grad, old, params, value, loss)
        like = lambda x, y: x if x.dtype == y.dtype else jnp.astype(x, y.dtype)
        return updates, jax.tree.map(like, new, merge(state)[1])

    def update(state: State, *, lr: PyTree = None) -> State:
        updates, new = step(state, *jax.value_and_grad(loss)(state.params), lr)
        return split_like((optax.apply_updates(state.params, updates), new), state)

    def increment(state: State, *, lr: PyTree = None) -> State:
        state = in_floats(state)
        updates, new = step(state, *jax.value_and_grad(loss)(state.params), lr)
        updates = optax.tree.cast_like(updates, state.params)
        return split_like((updates, optax.tree.sub(new, merge(state)[1])), state)

    def respond(state: State, grad: PyTree, *, lr: PyTree = None) -> State:
        opaque = split_of(factory, state.params, lr, kind).opaque
        if opaque is not None:
            raise ValueError(
                f"this optimizer {opaque}, so that no threshold or preconditioner "
                "follows from curvature"
            )
        updates, new = step(state, jnp.zeros((), _float_dtype(grad)), grad, lr)
        return split_like((optax.apply_updates(state.params, updates), new), state)

    def fluid(state: State, *, lr: PyTree = None) -> State:
        refusal = split_of(factory, state.params, lr, kind).refusal
        if refusal is not None:
            raise ValueError(f"no flow can carry this optimizer: {refusal}")
        return in_floats(state)

    return Dynamics(init, update, increment, respond, fluid, loss, cast)


def _float_dtype(params: PyTree) -> jnp.dtype:
    leaves = tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params has no leaves: there is nothing to optimize")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{keystr(path)} has dtype {jnp.result_type(leaf)}: parameters "
                "must be real floats; keep other data inside the loss"
            )
    return jnp.result_type(*(jnp.asarray(leaf).dtype for _, leaf in leaves))


def widest(tree: PyTree) -> jnp.dtype:
    """The widest of its dtypes of floats, single precision at least, to count in."""
    dtypes = [x.dtype for x in jax.tree.leaves(tree)]
    floats = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda d: jnp.finfo(d).bits)


def _check_scalar_loss(loss: Loss, params: PyTree) -> None:
    out = jax.eval_shape(loss, params)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"loss must return one real float (shape ()); it returns {out}. Average "
            "over samples, and drop auxiliary outputs"
        )


def in_floats(state: State) -> State:
    """Counters and flags as floats."""
    dtype = widest(state.params)
    # Not by `isdtype`, which knows no random keys.
    kinds = jnp.integer, jnp.bool
    discrete = lambda x: any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    return jax.tree.map(lambda x: jnp.astype(x, dtype) if discrete(x) else x, state)


def _as_optax(state: State, split: Split) -> State:
    """Flags and integers as Optax has them; counters may stay between two steps."""
    structure = jax.tree.structure(merge(state))
    dtypes = split_like(jax.tree.unflatten(structure, split.dtypes), state)

    def back(x: Array, dtype: Any) -> Array:
        if x.dtype == dtype or jnp.issubdtype(dtype, jnp.floating):
            return x
        flag = jnp.issubdtype(dtype, jnp.bool)
        return jnp.astype(x > 0.5 if flag else jnp.round(x), dtype)

    return state._replace(rest=jax.tree.map(back, state.rest, dtypes.rest))
