"""What every flow is: a few pure functions, most of them with a default."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.linalg import length
from rodjax.optimizer import Dynamics, State, Window, midpoint

#: The least oscillation relative to the parameters; see `floor_size`.
Floor = float | Callable[[Any], Any] | None
# The least second moment half a step back, as a share of what the step makes of it.
YOUNG = 0.25


@runtime_checkable
class InitFn(Protocol):
    """`init(start, *, lr, key) -> y`."""

    def __call__(self, start: PyTree | Window, /, *, lr: PyTree, key: Array) -> Any: ...


@runtime_checkable
class VectorField(Protocol):
    """`vector_field(t, y, lr) -> dy/dt`, as diffrax calls it."""

    def __call__(self, t: Any, y: Any, lr: PyTree, /) -> Any: ...


@runtime_checkable
class ObserveFn(Protocol):
    """`observe(y, *, lr) -> (ends, report)`."""

    def __call__(self, y: Any, /, *, lr: PyTree) -> tuple[PyTree, dict[str, Array]]: ...


def _default(*_: Any, **__: Any) -> Any:
    """Stands for what is filled in when the flow is made."""
    raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Flow:
    r"""A continuous-time model of an optimizer; time is in optimizer steps.

    Only the first two must be given; the others have defaults that serve a flow whose
    state is a `State`, or a tuple with one as its `mean`.

    - `dynamics`: the optimizer and loss that it models.
    - `vector_field(t, y, lr) -> dy/dt`: pure; any diffrax solver takes it, `lr` being
      diffrax's `args`.
    - `init(start, *, lr, key) -> y`: the flow's state, a pytree of floats, from
      parameters (from scratch) or from a `Window` of a discrete run. `key` seeds what
      must be random, such as the direction of the first oscillation. By default
      `centre_of(dynamics, start)`.
    - `centre(y) -> State`: the optimizer state at the centre; `.params` are what the
      flow predicts for the midpoint of the iterates. By default `y` or `y.mean`.
    - `observe(y, *, lr) -> (ends, report)`: `ends` are parameters with a leading axis,
      the points between which the flow says the iterates jump; their mean loss is the
      predicted time-averaged loss. `report` holds named scalars that only this flow can
      tell, recorded beside the metrics. By default the centre alone, and none.
    - `reports`: name -> long name of what `observe` reports.
    - `evaluations`: update-map or gradient evaluations in one call of the vector field.
    - `products`: products with the Hessian or a derivative of it in one call; NaN where
      their number depends on the problem.
    - `error_norm(error) -> size`: of a solver's error, structured as the state and
      divided by its tolerances; where a step is refused is where this is above 1. For
      `diffrax.PIDController(norm=...)`. By default the root mean square of all entries.
    - `euler_field(step) -> vector_field`: a field for Euler's method with constant
      steps of that size, below 1, closer to the optimizer than `vector_field`, which is
      the limit of short steps. By default none; a flow that has one is solved by it
      unless another solver is given.
    - `substeps`: steps of the default solver to an optimizer step; 4 by default, which
      is safe with Heun's method.
    - `offset`: 0 where the centre is the second-order midpoint at t, 1/2 where it is
      the half-step midpoint at t + 1/2.

    A flow of one's own, which damps the stable flow:

    ```python
    >>> import jax, jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> def field(t, y, lr):
    ...     return jax.tree.map(lambda f: 0.5 * f, sgd.increment(y, lr=lr))
    >>> slow = rj.flows.Flow(dynamics=sgd, vector_field=field)
    >>> path = rj.integrate(slow, jnp.array([1.0]), steps=10)
    >>> bool(abs(path.params[-1, 0] - jnp.exp(-0.5)) < 1e-4)
    True

    ```
    """

    dynamics: Dynamics
    vector_field: VectorField
    init: InitFn = _default
    centre: Callable[[Any], State] = _default
    observe: ObserveFn = _default
    reports: Mapping[str, str] = field(default_factory=dict, hash=False)
    evaluations: int = 1
    products: float = 0
    error_norm: Callable[[Any], Array] = _default
    euler_field: Callable[[float], VectorField] | None = None
    substeps: float = 4
    offset: float = 0.0

    def __post_init__(self) -> None:
        dynamics = self.dynamics
        centre = _mean if self.centre is _default else self.centre

        def init(start: PyTree | Window, *, lr: PyTree, key: Array) -> State:
            return centre_of(dynamics, start, lr=lr)

        def observe(y: Any, *, lr: PyTree) -> tuple[PyTree, dict[str, Array]]:
            return stack(centre(y).params), {}

        defaults = {
            "init": init,
            "centre": centre,
            "observe": observe,
            "error_norm": rms,
        }
        for name, default in defaults.items():
            if getattr(self, name) is _default:
                object.__setattr__(self, name, default)


def _mean(y: Any) -> State:
    """The default centre."""
    return y if isinstance(y, State) else y.mean


def shift(state: State, phase: PyTree, scale: float | Array = 1.0) -> State:
    """`state` with `scale * phase` added to its phase part.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> state = sgd.init(jnp.array([1.0, 2.0]))
    >>> rj.flows.shift(state, state.phase, -0.5).params.tolist()
    [0.5, 1.0]

    ```
    """
    # In the dtype of the state, where leaves may differ in theirs.
    add = lambda z, d: z + jnp.astype(scale * d, z.dtype)
    moved = jax.tree.map(add, state.phase, phase)
    return state._replace(phase=moved)


def moving(state: State, params: PyTree) -> State:
    """The field that moves the parameters by `params`, counts steps, and no more.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
    >>> field = rj.flows.moving(sgd.init(jnp.ones(2)), jnp.array([3.0, 4.0]))
    >>> field.params.tolist()
    [3.0, 4.0]

    ```
    """
    still = optax.tree.zeros_like(state)
    ticks = optax.tree.ones_like(state.clock)
    return still._replace(phase=(params, *still.phase[1:]), clock=ticks)


def half_step_back(y: State, field: State) -> State:
    r"""$y - f(y)/2$, where the vector field of a unit-step map is to be evaluated.

    One correction by backward error analysis, without derivatives: the flow whose
    time-1 map is $y + f(y)$ is $f - f'f/2$ to second order, and so is $f(y - f(y)/2)$,
    which needs no derivative of the optimizer (whose square root of a second moment has
    none at zero). Second moments grow from nothing, so none is taken below a quarter of
    what the step makes of it: taken to zero it would divide the first moment, which
    remembers the gradient here, by the gradient at another place.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * jnp.sum(w**2))
    >>> state = sgd.init(jnp.array([1.0]))
    >>> rj.flows.half_step_back(state, sgd.increment(state)).params.tolist()
    [1.25]

    ```
    """
    return step_back(y, field, 0.5)


def step_back(y: State, field: State, share: float) -> State:
    """`half_step_back` by another share of a step."""
    back = jax.tree.map(lambda a, f: a - share * f, y, field)
    slow = jax.tree.map(
        lambda b, s, f: jnp.maximum(b, YOUNG * (s + f)), back.slow, y.slow, field.slow
    )
    return back._replace(slow=slow)


def centre_of(dynamics: Dynamics, start: PyTree | Window, *, lr: PyTree) -> State:
    """Where a flow of midpoints starts, in floats: a window's, or the initial state.

    **Raises** `ValueError` in words if no flow can carry the optimizer's state.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(2.0), lambda w: 0.5 * w**2)  # w -> -w
    >>> window = rj.warm_up(sgd, jnp.array(8.0), steps=3)
    >>> float(rj.flows.centre_of(sgd, window, lr=None).params)
    0.0

    ```
    """
    if isinstance(start, Window):
        return dynamics.fluid(midpoint(start), lr=lr)
    return dynamics.fluid(dynamics.init(start, lr=lr), lr=lr)


def floor_size(
    floor: Floor,
) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    """(params, lr) -> the least size of an oscillation, `floor` relative to their norm.

    `None` stands for the dtype's epsilon, which is what rounding gives a real run; a
    function takes `lr`, so that a sweep may vary the floor. Parameters at zero count as
    of norm one.

    **Raises** `ValueError` if `floor` is a negative number.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> float(rj.flows.floor_size(1e-3)(jnp.array([3.0, 4.0]), None))
    0.005

    ```
    """
    if floor is not None and not callable(floor) and floor < 0:
        raise ValueError(f"floor must be at least 0, got {floor}")

    def least(params: PyTree, lr: PyTree) -> Array:
        norm = optax.tree.norm(params)
        # Of no length an oscillation has no direction to grow in either.
        norm = jnp.where(norm == 0, 1, norm)
        if floor is None:
            return float(jnp.finfo(norm.dtype).eps) * norm
        return jnp.asarray(floor(lr) if callable(floor) else floor, norm.dtype) * norm

    return least


def rms(tree: PyTree) -> Float[Array, ""]:
    """The root mean square of all entries of a tree.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> float(rj.flows.rms([jnp.array([5.0, 1.0, 1.0]), jnp.array(3.0)]))
    3.0

    ```
    """
    return length(tree) / max(optax.tree.size(tree), 1) ** 0.5


def stack(*trees: PyTree) -> PyTree:
    """Stack trees on a new leading axis.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> rj.flows.stack(jnp.ones(2), jnp.zeros(2)).tolist()
    [[1.0, 1.0], [0.0, 0.0]]

    ```
    """
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
