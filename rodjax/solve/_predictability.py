"""How far an optimizer gets from itself: no flow can be asked to be closer."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rodjax.optimizer import REACH, Dynamics, Window, compiled
from rodjax.solve._compare import Comparison, separation
from rodjax.solve._course import Course, descent
from rodjax.solve._integrate import LIMIT, everything, opened, saved_moments
from rodjax.solve._metrics import losses
from rodjax.solve._record import Place, begin, enter, measure, proceed
from rodjax.solve._trajectory import Metric

#: Nudged runs, of which the median counts.
DRAWS = 3


def predictability(
    dynamics: Dynamics,
    start: PyTree | Window,
    steps: int,
    *,
    lr: PyTree = None,
    seed: int = 0,
    draws: int = DRAWS,
    every: int = 1,
    metrics: Sequence[Metric] = (),
    keep: Callable[[PyTree], PyTree] = everything,
    limit: float = LIMIT,
    origin: PyTree = None,
) -> Comparison:
    r"""The distance to itself of a run that is nudged by one rounding error.

    The optimizer goes on from $w$, the parameters in the middle of the window, and from
    $w + s\,\mathrm{ulp}(w)$, one unit in the last place away in every coordinate, with
    random signs $s = \pm 1$, several times over. With $m_t$ and $m_t^{(i)}$ the
    second-order midpoints of the run and of nudged run i, the limit is

    $$d_t = \mathrm{median}_i\, \|m_t^{(i)} - m_t\|,$$

    in the unit of the parameters, as the distance of a flow is. What is below it
    nothing can predict that is computed in this precision: give it to `compare` and
    `plot` beside a flow.

    The runs are computed in turn (`lax.map`), each by the very same operations, so that
    nothing but the nudge is between them; products of a batch would round differently
    from those of `descend`.

    **Arguments**

    - `dynamics`, `start`, `steps`, `lr`, `every`, `metrics`, `keep`, `limit`, `origin`:
      as for `descend`. A parameter that is zero moves by next to nothing.
    - `seed`: of the signs.
    - `draws`: nudged runs, an odd number: their median is one of them.

    **Returns** a `Comparison`, whose `run` is the one that was not nudged and whose
    `flow`, `distance` and `diverged_at` are medians over the nudged ones, moment by
    moment, a run that has diverged being further away than any other. Its `evaluations`
    are those of all. It may be jitted, and vmapped over `lr`.

    **Raises** `ValueError` on a `draws` that is not odd and positive, on a `keep` that
    keeps nothing, and what `descend` does.

    Source: the definition is ours; the midpoints are those of Cohen et al., arXiv
    2410.24206.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd, lambda w: w**4 / 4 - w**2 / 2)
    >>> calm = rj.predictability(sgd, jnp.array(0.4), 100, lr=0.5)
    >>> wild = rj.predictability(sgd, jnp.array(0.4), 100, lr=1.7)  # chaos
    >>> bool(calm.distance[-1] < 1e-15), bool(wild.distance[-30:].max() > 0.1)
    (True, True)

    ```
    """
    moments = saved_moments(steps, every)
    if draws < 1 or draws % 2 == 0:
        raise ValueError(
            f"draws must be odd, so that the median is one of them; got {draws}"
        )
    window, lr = opened(dynamics, start, lr)
    if not jax.tree.leaves(jax.eval_shape(keep, window.at(0).params)):
        raise ValueError("keep= has kept no parameters: there is no distance")
    every_metric = (losses(dynamics.loss), *metrics)
    origin = jax.tree.map(jnp.asarray, origin)
    recorded = every_metric, keep, draws, moments, every, limit, origin
    return _predictability(dynamics, window, lr, jax.random.key(seed), *recorded)


@compiled
def _predictability(
    dynamics: Dynamics,
    window: Window,
    lr: PyTree,
    key: Array,
    metrics: tuple[Metric, ...],
    keep: Callable[[PyTree], PyTree],
    draws: int,
    moments: int,
    every: int,
    limit: float,
    origin: PyTree,
) -> Comparison:
    course = descent(dynamics, lr, every)

    def moment(places: Place, index: Array) -> tuple[Place, tuple[Array, PyTree]]:
        places, params, values = look_at_all(course, places, index > 0, metrics)
        return places, (itself(jax.vmap(keep)(params)), values)

    windows = nudged_windows(dynamics, window, lr, key, draws)
    start = lambda w: enter(course, begin(course, w, metrics, limit, origin))
    first = jax.lax.map(start, windows)
    end, (distance, values) = jax.lax.scan(moment, first, jnp.arange(moments + 1))
    step = window.step
    return Comparison(
        steps=step + every * jnp.arange(moments + 1, dtype=step.dtype),
        distance=distance,
        run=jax.tree.map(lambda x: x[:, 0], values),
        flow=jax.tree.map(lambda x: median(x[:, 1:], axis=1), values),
        evaluations=jnp.sum(end.evaluations),
        diverged_at=lost_at(end),
    )


def nudged(params: PyTree, key: Array) -> PyTree:
    """The parameters one unit in the last place away, up or down at random."""
    # All at once, which compiles quicker than leaf by leaf.
    ups = jax.random.bernoulli(key, shape=(optax.tree.size(params),))
    leaves, structure = jax.tree.flatten(params)
    ends = itertools.accumulate(x.size for x in leaves)

    def one(x: Array, end: int) -> Array:
        up = ups[end - x.size : end].reshape(x.shape)
        return jnp.nextafter(x, jnp.where(up, jnp.inf, -jnp.inf).astype(x.dtype))

    return structure.unflatten(map(one, leaves, ends))


def nudged_windows(
    dynamics: Dynamics, window: Window, lr: PyTree, key: Array, draws: int
) -> Window:
    """The window gone on with from its middle, as it is and nudged `draws` times."""
    middle = window.at(0)
    # By number, so that more draws begin with the same ones.
    draw = lambda i: nudged(middle.params, jax.random.fold_in(key, i))
    others = jax.vmap(draw)(jnp.arange(draws))
    before = [window.at(k) for k in range(-REACH, 0)]

    def restarted(params: PyTree) -> Window:
        moved = middle._replace(phase=(params, *middle.phase[1:]))
        return Window.of(dynamics, [*before, moved], step=window.step, lr=lr)

    all_of = lambda x, others: jnp.concatenate([x[None], others])
    return jax.lax.map(restarted, jax.tree.map(all_of, middle.params, others))


def look_at_all(
    course: Course, places: Place, go: Array, metrics: Sequence[Metric]
) -> tuple[Place, PyTree, PyTree]:
    """All runs at the next moment, or at this one; midpoints and metrics."""

    def one(place: Place) -> tuple[Place, PyTree, PyTree]:
        place = proceed(course, place, go)
        place, seen, values = measure(course, place, metrics)
        return place, seen.centre.params, values

    return jax.lax.map(one, places)


def itself(midpoints: PyTree) -> Array:
    """The median distance of all others from the first of the midpoints."""
    own = jax.tree.map(lambda x: x[0], midpoints)
    others = jax.tree.map(lambda x: x[1:], midpoints)
    ends = jax.tree.map(lambda x: x[None], own)
    apart = lambda other: separation(jnp.zeros(()), other, own, ends)
    return median(jax.vmap(apart)(others), axis=0)


def lost_at(places: Place) -> Array:
    """When more than half of the nudged runs had diverged; infinite if never."""
    return _middle(places.diverged_at[1:], axis=0)


def median(values: Array, axis: int) -> Array:
    """The median, in which NaN is beyond all numbers; NaN where it is that."""
    found = _middle(jnp.where(jnp.isnan(values), jnp.inf, values), axis)
    return jnp.where(jnp.isinf(found), jnp.nan, found)


def _middle(values: Array, axis: int) -> Array:
    """Of an odd number of values, which JAX's own median interpolates to NaN."""
    return jnp.take(jnp.sort(values, axis), values.shape[axis] // 2, axis)
