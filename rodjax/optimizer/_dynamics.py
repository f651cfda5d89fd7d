"""The update map of any Optax optimizer, split the way the flows need it."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, Float, PyTree

from rodjax.optimizer._angle import angle_of, no_edge_of
from rodjax.optimizer._clips import clips_of
from rodjax.optimizer._convolutions import for_loops
from rodjax.optimizer._sharding import check_mesh
from rodjax.optimizer._split import PARTS, Kind, OptimizerFactory, split_of
from rodjax.optimizer._state import (
    State,
    as_optax,
    in_floats,
    in_singles,
    merge,
    split_like,
)
from rodjax.optimizer._trial import update_with

Loss = Callable[[Any], Float[Array, ""]]
STOCHASTIC = (
    "a loss of a key or a batch is another one at every step, and flows model "
    "full-batch training. Close over the data, with dropout switched off: "
    "lambda params: loss(params, data)"
)


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


class AngleFn(Protocol):
    """`angle(params, *, lr) -> float | None`."""

    def __call__(self, params: PyTree, *, lr: PyTree = None) -> float | None: ...


class NoEdgeFn(Protocol):
    """`no_edge(params, *, lr) -> str | None`."""

    def __call__(self, params: PyTree, *, lr: PyTree = None) -> str | None: ...


class ClipsFn(Protocol):
    """`clips(params, *, lr) -> bool`."""

    def __call__(self, params: PyTree, *, lr: PyTree = None) -> bool: ...


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
    - `fluid(state, *, lr) -> State`: the state in floats, of single precision at least,
      as a flow carries it. Raises
      `ValueError` in words where no flow can carry the state of this optimizer.
    - `angle(params, *, lr)`: the angle at which stability is first lost, pi for an
      oscillation of period two, as a number under tracing too; `None` where shapes do
      not tell (no threshold, or an `lr` of several hyperparameters).
    - `no_edge(params, *, lr)`: why linear theory has no threshold for the optimizer, in
      words, likewise; `None` where it has one, or shapes do not tell.
    - `clips(params, *, lr)`: whether large gradients may be clipped, likewise; True
      where that is not seen.
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
    angle: AngleFn
    no_edge: NoEdgeFn
    clips: ClipsFn
    loss: Loss
    cast: CastFn


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
    that are not real floats, a loss that is not a scalar
    or no function of the parameters alone, an `lr` missing or given in
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

    value_and_grad = for_loops(jax.value_and_grad(loss))

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
        dtypes = split_of(factory, state.params, lr, kind).dtypes
        params, old = merge(as_optax(state, dtypes))
        updates, new = update_with(factory(lr), grad, old, params, value, loss)
        like = lambda x, y: x if x.dtype == y.dtype else jnp.astype(x, y.dtype)
        return updates, jax.tree.map(like, new, merge(state)[1])

    def update(state: State, *, lr: PyTree = None) -> State:
        value, grad = value_and_grad(state.params)
        updates, new = step(state, value, grad, lr)
        return split_like((optax.apply_updates(state.params, updates), new), state)

    def increment(state: State, *, lr: PyTree = None) -> State:
        state = in_floats(state)
        value, grad = value_and_grad(state.params)
        updates, new = step(state, value, grad, lr)
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
        # What a flow follows would vanish among the roundings of half a precision.
        return in_singles(in_floats(state))

    def angle(params: PyTree, *, lr: PyTree = None) -> float | None:
        return angle_of(factory, params, lr, kind)

    def no_edge(params: PyTree, *, lr: PyTree = None) -> str | None:
        return no_edge_of(factory, params, lr, kind)

    def clips(params: PyTree, *, lr: PyTree = None) -> bool:
        return clips_of(factory, params, lr, kind)

    return Dynamics(
        init,
        update,
        increment,
        respond,
        fluid,
        angle,
        no_edge,
        clips,
        loss,
        cast,
    )


def _float_dtype(params: PyTree) -> jnp.dtype:
    leaves = tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params has no leaves: there is nothing to optimize")
    check_mesh(params, "params")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{keystr(path)} has dtype {jnp.result_type(leaf)}: parameters "
                "must be real floats; keep other data inside the loss"
            )
    return jnp.result_type(*(jnp.asarray(leaf).dtype for _, leaf in leaves))


def _check_scalar_loss(loss: Loss, params: PyTree) -> None:
    try:
        out = jax.eval_shape(loss, params)
    except TypeError as error:
        if "required positional argument" not in str(error):
            raise
        raise TypeError(
            f"loss takes more than the parameters ({error}): {STOCHASTIC}"
        ) from error
    except Exception as error:
        # Of Flax, whom nothing here knows: counters of dropout, statistics of batches.
        if type(error).__name__ != "TraceContextError":
            raise
        raise ValueError(
            f"loss changes a module that it holds ({error}). Where that is a counter "
            f"of dropout or statistics of a batch, {STOCHASTIC}; where it puts the "
            "parameters into the module, use flax.nnx.merge in its place"
        ) from error
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"loss must return one real float (shape ()); it returns {out}. Average "
            "over samples, and drop auxiliary outputs"
        )
