"""The update map of any Optax optimizer, split the way the flows need it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import (
    GetAttrKey,
    keystr,
    tree_leaves_with_path,
    tree_map_with_path,
)
from jaxtyping import Array, Float, PyTree

#: Optax state fields that hold second moments: gradients enter them squared.
SECOND_MOMENTS = frozenset(
    {"nu", "nu_max", "sum_of_squares", "e_g", "e_x", "n", "v_row", "v_col"}
)

Loss = Callable[[Any], Float[Array, ""]]
OptimizerFactory = Callable[[Any], optax.GradientTransformation]
Kind = Callable[[tuple[Any, ...], Any], str | None]


class State(NamedTuple):
    """The whole state of an optimizer, in three parts of one tree structure.

    Every part has the structure `(params, optax_state)` with `None` where a leaf
    belongs to another part, so `equinox.combine(*state)` is the whole.

    - `phase`: what may flip sign every step: parameters and first moments.
    - `slow`: second moments, which do not flip since gradients enter squared.
    - `clock`: step counters, carried as floats so that a flow can advance them.

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
      the loss's gradient (how curvature enters is then the caller's choice).
    - `loss(params)`: the scalar loss.
    - `cast(params, *, lr)`: `lr` as arrays of the parameters' dtype, checked.

    `lr` is whatever the optimizer factory takes, as traced data, or `None` where
    the optimizer was given ready made.
    """

    init: InitFn
    update: StepFn
    increment: StepFn
    respond: RespondFn
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
    into phase, slow and clock (see `State`). Scalar integers are clocks; fields named
    as second moments (`SECOND_MOMENTS`) are slow; every other float leaf is phase.

    **Arguments**

    - `optimizer`: an `optax.GradientTransformation`, or a function from a learning
      rate (or any pytree of hyperparameters) to one, such as `optax.adam` or
      `lambda hp: optax.adam(hp["lr"], b2=hp["b2"])`. With a function, the learning
      rate is data: pass `lr=` to `integrate` and `descend`, under `jax.vmap` too, and
      a whole grid shares one compilation.
    - `loss`: params -> scalar, differentiable.
    - `kind`: optional override of the split, a function `(path, leaf) -> "phase" |
      "slow" | "clock" | None` over the leaves of the Optax state (`path` as in
      `jax.tree_util`); `None` keeps the default for that leaf.

    **Raises**

    `TypeError` or `ValueError`, from `init`, naming the leaf or argument: parameters
    that are not real floats, a loss that is not a scalar, a state leaf that cannot be
    carried along a flow (an integer array that is no counter, a key, a boolean), an
    `lr` missing or given in vain.

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
        dtype = _float_dtype(params)
        params = jax.tree.map(jnp.asarray, params)
        _check_scalar_loss(loss, params)
        whole = (params, factory(lr).init(params))
        inner = [path for path, _ in tree_leaves_with_path(params)]
        kinds = tree_map_with_path(lambda path, x: _kind(path, x, inner, kind), whole)
        # Half precision cannot count steps.
        clock_dtype = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        whole = jax.tree.map(
            # An explicit dtype also drops weak types, which would retrace a scan.
            lambda x, k: jnp.asarray(
                x, clock_dtype if k == "clock" else jnp.result_type(x)
            ),
            whole,
            kinds,
        )
        return State(
            *(
                eqx.filter(whole, jax.tree.map(lambda k, p=part: k == p, kinds))
                for part in State._fields
            )
        )

    def step(state: State, value: Array, grad: PyTree, lr: PyTree):
        params, old = merge(state)
        optimizer = optax.with_extra_args_support(factory(lr))
        updates, new = optimizer.update(
            grad, old, params, value=value, grad=grad, value_fn=loss
        )
        return updates, optax.tree.cast_like(new, old)

    def update(state: State, *, lr: PyTree = None) -> State:
        updates, new = step(state, *jax.value_and_grad(loss)(state.params), lr)
        return split_like((optax.apply_updates(state.params, updates), new), state)

    def increment(state: State, *, lr: PyTree = None) -> State:
        updates, new = step(state, *jax.value_and_grad(loss)(state.params), lr)
        updates = optax.tree.cast_like(updates, state.params)
        return split_like((updates, optax.tree.sub(new, merge(state)[1])), state)

    def respond(state: State, grad: PyTree, *, lr: PyTree = None) -> State:
        updates, new = step(state, jnp.zeros((), _float_dtype(grad)), grad, lr)
        return split_like((optax.apply_updates(state.params, updates), new), state)

    return Dynamics(init, update, increment, respond, loss, cast)


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


def _check_scalar_loss(loss: Loss, params: PyTree) -> None:
    out = jax.eval_shape(loss, params)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"loss must return one real float (shape ()); it returns {out}. Average "
            "over samples, and drop auxiliary outputs"
        )


def _kind(
    path: tuple[Any, ...],
    leaf: Any,
    inner: list[tuple[Any, ...]],
    override: Kind | None,
) -> str:
    in_params, rest = path[0].idx == 0, path[1:]
    if in_params:
        return "phase"
    if override is not None and (chosen := override(rest, leaf)) is not None:
        if chosen not in State._fields:
            raise ValueError(
                f"kind returned {chosen!r} for {keystr(rest)}: it must be 'phase', "
                "'slow', 'clock' or None"
            )
        return chosen
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.shape(leaf) == ():
        return "clock"
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"optimizer state leaf {keystr(rest)} has dtype {dtype} and shape "
            f"{jnp.shape(leaf)}: a flow can carry floats and scalar step counters "
            "only. Use an optimizer without it (no injected noise, no integer buffers)"
        )
    # The parameters' own attribute names, below Optax's, say nothing about the field.
    depth = max((len(p) for p in inner if p and rest[-len(p) :] == p), default=0)
    fields = rest[: len(rest) - depth]
    names = (key.name for key in fields if isinstance(key, GetAttrKey))
    return "slow" if any(name in SECOND_MOMENTS for name in names) else "phase"
