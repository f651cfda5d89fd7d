"""What can be recorded along a trajectory: losses, sharpness, coefficients."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rodjax.curvature import (
    hessian_eigenpairs,
    preconditioned_eigenpairs,
    sharpness_ratio,
    starting_direction,
    starting_directions,
)
from rodjax.flows import principal_coefficient
from rodjax.linalg import dot
from rodjax.optimizer import Dynamics, Loss, for_loops, has_momentum, learning_rate
from rodjax.solve._trajectory import Metric, Snapshot

#: Name -> long name of what is recorded along every trajectory.
LOSSES: Mapping[str, str] = MappingProxyType(
    {
        "loss": "loss at the centre",
        "mean_loss": "loss averaged over the ends of the oscillation",
        "amplitude": "size of the oscillation of the parameters",
    }
)


def monitor(functions: Mapping[str, Callable[[PyTree], Float[Array, ""]]]) -> Metric:
    """Functions of the parameters, recorded at the centre, such as an accuracy.

    **Arguments**

    - `functions`: name -> function of the parameters to a scalar, such as the `metrics`
      of a problem.

    **Raises** `ValueError` for a name that is recorded anyway, such as `loss`.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * jnp.sum(w**2))
    >>> size = rj.monitor({"size": lambda w: jnp.max(jnp.abs(w))})
    >>> run = rj.descend(sgd, jnp.ones(2), 3, metrics=[size])
    >>> [round(float(x), 3) for x in run.metrics["size"]]  # at the midpoints
    [1.0, 0.562, 0.281, 0.141]

    ```
    """
    functions = dict(functions)
    for name in LOSSES:
        if name in functions:
            raise ValueError(f"functions has {name!r}, which is recorded anyway")

    def update(snapshot, carry, *, lr):
        params = snapshot.centre.params
        return {name: f(params) for name, f in functions.items()}, carry

    return Metric(lambda snapshot, *, lr: (), update)


def losses(loss: Loss) -> Metric:
    """`loss` at the centre, `mean_loss` over the ends, and `amplitude`.

    Of a flow `mean_loss` is the predicted time average of the loss.
    """

    def update(snapshot, carry, *, lr):
        mean = jnp.mean(_each(loss, snapshot.ends))
        values = loss(snapshot.centre.params), mean, snapshot.amplitude
        return dict(zip(LOSSES, values, strict=True)), carry

    return Metric(lambda snapshot, *, lr: (), update, LOSSES)


def _each(loss: Loss, stacked: PyTree) -> Array:
    """The loss at each of several points; one by one where it is not to be vmapped."""
    try:
        jax.eval_shape(jax.vmap(loss), stacked)
    except (NotImplementedError, ValueError):
        return jax.lax.map(loss, stacked)
    return jax.vmap(loss)(stacked)


def edge_of_stability(dynamics: Dynamics, *, tol: float | None = None) -> Metric:
    """Metric `sharpness_ratio` (see there) and its `residual`, warm-started.

    For `metrics=` of `integrate` and `descend`. The ratio is taken at the centre, with
    what clips the gradient at an end of the oscillation.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 2, metrics=[rj.edge_of_stability(sgd)])
    >>> run.metrics["sharpness_ratio"].round(6).tolist()
    [0.75, 0.75, 0.75]

    ```
    """

    def update(snapshot, vector, *, lr):
        grad = _shown(dynamics, snapshot)
        pair = sharpness_ratio(
            dynamics, snapshot.centre, lr=lr, grad=grad, guess=vector, tol=tol
        )
        values = {"sharpness_ratio": pair.value, "residual": pair.residual}
        return values, _guess(pair.residual, pair.vector, vector)

    long_names = {
        "sharpness_ratio": "preconditioned sharpness over its stability threshold",
        "residual": "relative residual of the sharpness's eigenpair",
    }
    return Metric(
        lambda snapshot, *, lr: starting_direction(snapshot.centre.params),
        update,
        long_names,
    )


def spectrum(dynamics: Dynamics, k: int, *, tol: float | None = None) -> Metric:
    """Metric `ratio_1` to `ratio_k` of `preconditioned_eigenpairs`, warm-started.

    And the largest of their residuals, `residual`. For `metrics=` of `integrate` and
    `descend`, in place of `edge_of_stability`, whose `sharpness_ratio` is `ratio_1`.
    The ratios are taken at the centre.

    **Raises** `ValueError` if `k` is below 1, and from `init` if it exceeds the number
    of parameters.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.5), lambda w: 0.5 * (3.0 * w[0]**2 + w[1]**2))
    >>> run = rj.descend(sgd, jnp.ones(2), 2, metrics=[rj.spectrum(sgd, 2)])
    >>> run.metrics["ratio_2"].round(6).tolist()
    [0.25, 0.25, 0.25]

    ```
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    over = "over its stability threshold"
    long_names = {
        f"ratio_{i + 1}": f"preconditioned eigenvalue {i + 1} {over}" for i in range(k)
    }
    long_names["residual"] = "largest relative residual of the eigenpairs"

    def update(snapshot, vectors, *, lr):
        grad = _shown(dynamics, snapshot)
        pairs = preconditioned_eigenpairs(
            dynamics, snapshot.centre, k, lr=lr, grad=grad, guess=vectors, tol=tol
        )
        values = {f"ratio_{i + 1}": value for i, value in enumerate(pairs.values)}
        values["residual"] = jnp.max(pairs.residuals)
        return values, _guess(values["residual"], pairs.vectors, vectors)

    return Metric(
        lambda snapshot, *, lr: starting_directions(snapshot.centre.params, k),
        update,
        long_names,
    )


def stability_coefficients(
    dynamics: Dynamics, k: int, *, tol: float | None = None
) -> Metric:
    r"""Metric: how gradient descent moves along each of the k top eigenvectors.

    `stability_coefficient_1`, ... are the real parts of $\frac{\log(1 -
    \eta\lambda_i)}{\eta\lambda_i} (g \cdot u_i)$ at the centre, with the sign of $u_i$
    such that $g \cdot u_i \ge 0$: negative where the direction is descended, positive,
    beyond $\eta\lambda_i = 2$, where it is climbed. `stability_residual` is the largest
    of the eigenpairs'. For `metrics=` of `integrate` and `descend`, along any
    trajectory of gradient descent. Source: Rosca et al., arXiv 2302.01952.

    **Raises** `ValueError`, on use, if k is below 1 or above the number of parameters,
    or if the optimizer has momentum or a preconditioner.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(1.0), lambda w: 0.5 * (2.5 * w[0]**2 + w[1]**2))
    >>> metric = rj.stability_coefficients(sgd, 1)
    >>> run = rj.descend(sgd, jnp.array([1.0, 0.0]), 1, metrics=[metric])
    >>> round(float(run.metrics["stability_coefficient_1"][0]), 3)  # ln 1.5 / 2.5 * 2.5
    0.405

    ```
    """

    long_names = {
        f"stability_coefficient_{i + 1}": f"rate of descent along eigenvector {i + 1}"
        for i in range(k)
    }
    long_names["stability_residual"] = "largest relative residual of the eigenpairs"

    def update(snapshot, guess, *, lr):
        if has_momentum(snapshot.centre) or jax.tree.leaves(snapshot.centre.slow):
            raise ValueError(
                "stability_coefficients describes gradient descent only. For other "
                "optimizers record rodjax.spectrum(dynamics, k)"
            )
        params = snapshot.centre.params
        pairs = hessian_eigenpairs(dynamics.loss, params, k, guess=guess, tol=tol)
        rate = learning_rate(dynamics, snapshot.centre, lr=lr)
        slope = for_loops(jax.grad(dynamics.loss))(params)
        along = jnp.abs(jax.vmap(lambda u: dot(u, slope))(pairs.vectors))
        least = float(jnp.finfo(along.dtype).tiny)
        factors = jnp.real(principal_coefficient(rate * pairs.values, least))
        values = factors * along
        named = {f"stability_coefficient_{i + 1}": v for i, v in enumerate(values)}
        named["stability_residual"] = jnp.max(pairs.residuals)
        return named, _guess(named["stability_residual"], pairs.vectors, guess)

    return Metric(
        lambda snapshot, *, lr: starting_directions(snapshot.centre.params, k),
        update,
        long_names,
    )


def _shown(dynamics: Dynamics, snapshot: Snapshot) -> PyTree:
    """The gradient that the optimizer is shown: not at the centre, but at an end."""
    return for_loops(jax.grad(dynamics.loss))(
        jax.tree.map(lambda x: x[0], snapshot.ends)
    )


def _guess(residual: Float[Array, ""], vectors: PyTree, last: PyTree) -> PyTree:
    """What the next moment's iteration starts from, a constant of any derivative.

    A lane that has diverged must not hand NaN to a later warm start.
    """
    found = optax.tree.where(jnp.isfinite(residual), vectors, last)
    return jax.lax.stop_gradient(found)
