"""Toy landscapes that are not quadratic: a curved valley and a cosine."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from rodjax.problems._base import Problem, float_dtype
from rodjax.problems._checks import check_finite, check_numbers, check_positive


def banana(
    *,
    steepness: float = 1.0,
    initial: tuple[float, float] = (-1.0, 2.0),
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""A curved valley, Rosenbrock's function.

    $L(x, y) = (1 - x)^2 + s\, (y - x^2)^2$, s the `steepness`; its minimum is 0 at
    $(1, 1)$, where the Hessian has trace $2 + 10 s$ and determinant $4 s$.

    **Arguments**

    - `steepness`: of the valley's walls, positive; 100 in the classical function.
    - `initial`: the initial `(x, y)`.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"x": [], "y": []}`.

    **Raises** `ValueError` if `steepness` is not positive, or another argument is
    unfit.

    Source: Rosenbrock, The Computer Journal 3 (1960); an example of Rosca et al., TMLR
    2023, arXiv 2302.01952.

    ```python
    >>> problem = banana(initial=(0.0, 1.0))
    >>> float(problem.loss(problem.params))
    2.0

    ```
    """
    dtype = float_dtype(dtype)
    check_positive("steepness", steepness)
    check_numbers("initial", initial, 2)

    def loss(params):
        x, y = params["x"], params["y"]
        return (1 - x) ** 2 + steepness * (y - x**2) ** 2

    x, y = (jnp.asarray(v, dtype) for v in initial)
    return Problem("banana", loss, {"x": x, "y": y})


def cosine(*, initial: float = 0.5, dtype: DTypeLike | None = None) -> Problem:
    r"""One parameter on a cosine, $L(w) = \cos w$.

    Maxima at $0, 2\pi, \dots$ of curvature -1, minima at $\pi, 3\pi, \dots$ of
    curvature 1: gradient descent leaves a maximum by a factor $1 + \eta$ a step and a
    minimum, if $\eta > 2$, by $1 - \eta$.

    **Arguments**

    - `initial`: the initial parameter.
    - `dtype`: of the parameter; None for JAX's default float.

    **Returns** the problem; its parameter is one array of shape `()`.

    **Raises** `ValueError` if `initial` is not finite, or `dtype` is unfit.

    Source: an example of Rosca et al., TMLR 2023, arXiv 2302.01952.

    ```python
    >>> problem = cosine(initial=0.0)
    >>> float(problem.loss(problem.params))
    1.0

    ```
    """
    dtype = float_dtype(dtype)
    check_finite("initial", [initial])
    return Problem("cosine", jnp.cos, jnp.asarray(initial, dtype))
