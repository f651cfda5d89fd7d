"""An optimizer that is watched: what it does is unchanged, what it did is kept."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from rodjax.optimizer import check_mesh, widest
from rodjax.training._inputs import Given, given_to, groups_of, served, taken_by
from rodjax.training._look import Kept, Plan, probe
from rodjax.training._quantities import QUANTITIES, TRACKED, checked
from rodjax.training._status import Course, no_course, with_loss
from rodjax.training._step import (
    alternation,
    last_edge,
    lengths,
    oscillation,
    this_step,
    update_ratio,
)
from rodjax.training._theory import no_threshold


class WatchState(NamedTuple):
    """The state of `watch`, which `report` reads.

    - `inner`: that of the optimizer, as it is without being watched.
    - `step`: steps taken.
    - `probed_at`: the last step that curvature was looked at; -1 before the first.
    - `status`: index into `STATUS`.
    - `values`: quantity -> the numbers that it is read from, all of them finite.
    - `directions`: quantity -> a pytree like the parameters that goes on with it.
    - `course`: what the loss and the ratio have been.
    """

    inner: PyTree
    step: Int[Array, ""]
    probed_at: Int[Array, ""]
    status: Int[Array, ""]
    values: dict[str, Array]
    directions: dict[str, PyTree]
    course: Course


def is_watch(node: Any) -> bool:
    """Whether it is the state of `watch`, or the dict that a file has in its place."""
    named = isinstance(node, Mapping) and set(WatchState._fields) <= set(node)
    return named or isinstance(node, WatchState)


def watch(
    optimizer: optax.GradientTransformation,
    *,
    every: int = 20,
    quantities: Iterable[str] | None = None,
    products: int = 3,
    full_batch: bool = False,
    probe_fn: Callable[..., Any] | None = None,
    by: Callable[[tuple[Any, ...]], str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, watched: `report` tells where its run stands. Its updates and its
    state are those that it has without, bit for bit where the compiler rounds alike: it
    may join a sum and a product in one program that it does not join in another.

    Pure: works under `jax.jit`, `scan` and `vmap`, with sharded parameters, and calls
    nothing on the host. With s the step, g the gradient, $L_B$ and $H_B$ the loss of
    the batch that the step is taken with and its Hessian, the quantities are:

    - `update_ratio` *: $|s| / |w|$.
    - `realized_edge` *: $\zeta = 1 - (L_B(w+s) - L_B(w)) / (g \cdot s)$, 1/2 for the
      best step along s, 1 where it gains nothing, above where the loss rises. Takes
      `value_fn`, one evaluation at every n-th step; with `full_batch` `value` instead.
    - `oscillation` *: size of the mean of $(-1)^t f \cdot s_t$ over the root mean
      square of $|s|$, f the tracked top direction; and `oscillation_floor`, what white
      noise of the same variance would show.
    - `alternation`: $|u_t - 2 u_{t-1} + u_{t-2}| / 8|u_t|$ of the updates, 1/2 if they
      do nothing but alternate. Noise of batches alternates too: for full batches.
    - `step_curvature` *: $s^T H_B s / (-s \cdot g)$, 2 at the edge. Takes `value_fn`
      and a product.
    - `sharpness_ratio` *: preconditioned sharpness over the optimizer's own threshold
      as it stands, with its schedule and clipping, 1 at the edge; and
      `sharpness_ratio_residual`. Takes `probe_fn` or else `value_fn`, and `products`.
    - `sharpness`: the largest eigenvalue of the Hessian; likewise.
    - `batch_sharpness`: mean of $g_B^T H_B g_B / |g_B|^2$, with `_error` and
      `_batches`. Takes `value_fn` and a product.
    - `noise_interaction`: mean of $g_B^T H g_B / |g|^2$; likewise. Takes `probe_fn`.

    Those with * are watched by default, as far as the loop gives what they take. Those
    that take products are found at every n-th step, the others at every one. Means are
    over the last 32 probes, each a batch of its own. On a quadratic, or for small
    steps, `step_curvature` is twice `realized_edge`. `oscillation` looks back about 20
    steps, and is an indication where it is well above its floor.

    These are indicators, not certificates: whether a run with mini-batches is stable
    depends on the variance of $H_B$ too, even in one dimension. SGD settles with its
    batch sharpness at $2/\eta$, heavy ball at $2(1-\beta)/\eta$ with small batches and
    $2(1+\beta)/\eta$ with large ones, while the sharpness of the whole set stays below.
    A ratio from a single small batch's loss is that of this batch: give `probe_fn`.

    **Arguments**

    - `optimizer`: any Optax optimizer. Put chains inside, so that the gradients that
      arrive are the loss's and the updates that leave are the steps.
    - `every`: n, in steps. A probe is a turn of `jax.lax.while_loop` that other steps
      do not take, nor do lanes of `jax.vmap` that are all at such a step.
    - `quantities`: names to watch; `None` for the default.
    - `products`: with the Hessian for each largest eigenvalue at a probe, from the
      vector of the last on (`rodjax.linalg.refined_eigenpair`); about 20 the first
      time. Values approach from below, and the residual tells how near they are: on
      digits below 0.1 within 5 %, and above in a burst, where the direction turns.
    - `full_batch`: whether every step has the same loss. Its next `value` then tells
      what the last step has gained.
    - `probe_fn`: the loss of a fixed larger set, params -> scalar, for loops that
      pass no extra arguments, such as that of `TrainState`.
    - `by`: path of a parameter (as in `jax.tree_util`) -> name of its group. Adds
      `block_sharpness/NAME`, the largest eigenvalue of the group's block of the
      Hessian, for `products` products each, and `share/NAME`, the group's share of the
      top direction; shares sum to one.

    `update` takes Optax's extra arguments `value`, the loss of the batch, `value_fn`,
    this loss as a function of the parameters, `grad`, its gradient if it is not what is
    given first, and `probe_fn`; `value_fn` may name others, such as a batch. The
    optimizer gets all but `probe_fn`, if it takes them.

    **Returns** a transformation with the state `WatchState`. Beside the optimizer's it
    holds one copy of the parameters for each of `sharpness_ratio`, `sharpness` and
    `by`, and a few numbers.

    **Raises** `ValueError`: for an unknown name, or one without the input that it needs
    (when `update` is first traced); from `init`, for a `sharpness_ratio` that was asked
    for by name where linear theory has no threshold for the optimizer. By default it
    is left out then, with a warning that says why.

    Sources: Lee, Lee, arXiv 2608.18415 (realized edge); Andreyev, Beneventano, arXiv
    2412.20553 (batch sharpness, noise interaction), and with momentum 2604.14108;
    Cohen et al., arXiv 2207.14484 (preconditioned sharpness).

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> loss = lambda w, batch: jnp.mean((batch @ w - 1.0) ** 2)
    >>> tx = rj.training.watch(optax.sgd(0.1), every=2)
    >>> @jax.jit
    ... def step(w, state, batch):
    ...     value, grad = jax.value_and_grad(loss)(w, batch)
    ...     extra = {"value": value, "value_fn": lambda w: loss(w, batch)}
    ...     updates, state = tx.update(grad, state, w, **extra)
    ...     return optax.apply_updates(w, updates), state
    >>> w = jnp.array([0.1, 0.2])
    >>> state = tx.init(w)
    >>> for seed in range(5):
    ...     batch = jax.random.normal(jax.random.key(seed), (32, 2))
    ...     w, state = step(w, state, batch)
    >>> found = rj.training.report(state)
    >>> rj.training.STATUS[int(found["status"])], bool(found["sharpness_ratio"] < 0.5)
    ('below', True)

    ```
    """
    if every < 1 or products < 1:
        raise ValueError(
            "every and products must be at least 1; got "
            f"every={every}, products={products}"
        )
    names, by_name = checked(quantities), quantities is not None
    said: set[str] = set()

    def with_theory(params: PyTree) -> tuple[str, ...]:
        """The names without those that have no meaning for this optimizer."""
        if "sharpness_ratio" not in names:
            return names
        reason = no_threshold(optimizer, params)
        if reason is None:
            return names
        reason = f"sharpness_ratio has no meaning for this optimizer: {reason}"
        if by_name:
            raise ValueError(reason)
        if reason not in said:
            said.add(reason)
            warnings.warn(f"{reason}. It is left out", stacklevel=3)
        return tuple(n for n in names if n not in ("sharpness_ratio", "oscillation"))

    def init(params: PyTree) -> WatchState:
        check_mesh(params, "params")
        kept, groups, dtype = with_theory(params), groups_of(params, by), widest(params)
        zeros = lambda: optax.tree.zeros_like(params)
        directions = {name: zeros() for name in TRACKED if name in kept}
        keys = [*kept]
        keys += [f"share/{name}" for name in groups if directions]
        keys += [f"block_sharpness/{name}" for name in groups]
        if groups:
            directions["block_sharpness"] = zeros()
        if "alternation" in kept:
            directions |= {"alternation/1": zeros(), "alternation/2": zeros()}
        size = lambda key: QUANTITIES[key.partition("/")[0]].size
        values = {key: jnp.zeros(size(key), dtype) for key in keys}
        count = lambda n: jnp.asarray(n, jnp.int32)
        return WatchState(
            optimizer.init(params),
            count(0),
            count(-1),
            count(0),
            values,
            directions,
            no_course(dtype),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, WatchState]:
        if params is None:
            raise ValueError("watch needs the parameters: call update(..., params)")
        given = given_to(updates, params, extra, probe_fn)
        there = served(state.values, given, full_batch, by_name)
        counts = given.value is not None and given.probe is None
        plan = Plan(
            optimizer, there, products, full_batch, groups_of(params, by), counts
        )
        # Whoever differentiates a step, by its learning rate say, differentiates that.
        still = lambda tree: jax.tree.map(jax.lax.stop_gradient, tree)
        params, grad, value, slopes, before = still((*given[:3], updates, state))
        given = Given(params, grad, value, given.batch, given.probe)
        dtype, step = before.course.mean.dtype, before.step
        course = before.course
        if counts:
            course = with_loss(course, jnp.asarray(given.value))
        values = dict(before.values)
        by_value = "realized_edge" in there and full_batch
        if by_value:
            values["realized_edge"] = last_edge(
                values["realized_edge"], jnp.asarray(given.value)
            )
        kept = Kept(values, before.directions, course, before.status, before.probed_at)
        taken = taken_by(optimizer, extra)

        def look(turn: tuple[Array, Kept]) -> tuple[Array, Kept]:
            # Through `turn`, so that nothing of it is computed where there is no turn,
            # nor shared with the step itself, which would then be rounded otherwise.
            at = given._replace(params=only(turn[0], given.params))
            at = at._replace(grad=only(turn[0], given.grad))
            own, inner = only(turn[0], (slopes, before.inner))
            took, _ = optimizer.update(own, inner, at.params, **taken)
            found = probe(plan, at, took, inner, step, dtype, turn[1])
            return jnp.zeros((), bool), found

        # A loop of one turn or none: unlike a branch it copies nothing where it does
        # nothing, and lanes of `jax.vmap` that skip it together do skip it. The step
        # comes after it, and is taken once more in it, so that nothing of the old
        # parameters, moments and gradient has to be kept for it.
        _, kept = jax.lax.while_loop(
            lambda turn: turn[0], look, (step % every == 0, kept)
        )
        after = only(kept.probed_at >= -1, updates)
        steps, inner = optimizer.update(after, state.inner, params, **taken)
        seen = still(steps)
        size = lengths(given, seen, dtype)
        values, directions = dict(kept.values), dict(kept.directions)
        if by_value:
            values["realized_edge"] = this_step(
                values["realized_edge"], jnp.asarray(given.value), size
            )
        if "update_ratio" in there:
            values["update_ratio"] = update_ratio(given, size)
        if "oscillation" in there:
            values["oscillation"] = oscillation(
                values["oscillation"], step, directions, seen
            )
        if "alternation" in there:
            back = directions["alternation/1"], directions["alternation/2"]
            values["alternation"] = alternation(step, seen, *back, dtype)
            directions["alternation/1"] = jax.tree.map(
                lambda x, old: x.astype(old.dtype), seen, back[0]
            )
            directions["alternation/2"] = back[0]
        return steps, WatchState(
            inner,
            jnp.asarray(optax.safe_increment(step)),
            kept.probed_at,
            kept.status,
            values,
            directions,
            kept.course,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def only(there: Array, tree: PyTree) -> PyTree:
    """`tree`, as what is known only once `there`, which is always true, is known."""
    key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    none = lambda x: x if key(x) else jnp.where(there, x, jnp.zeros_like(x))
    return jax.tree.map(none, tree)
