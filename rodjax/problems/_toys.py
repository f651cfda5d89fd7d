"""Toy problems whose dynamics under gradient descent are known in closed form."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from rodjax.problems._base import Problem, float_dtype
from rodjax.problems._checks import (
    check_finite,
    check_numbers,
    check_positive,
    vector,
)


def quadratic(
    spectrum: Sequence[float] | ArrayLike,
    *,
    seed: int | None = None,
    scale: float = 1.0,
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""A quadratic with a prescribed Hessian spectrum.

    $L(w) = \tfrac12 w^T H w$ with $H = Q\, \mathrm{diag}(h)\, Q^T$, h the `spectrum`.
    An optimizer step of gradient descent multiplies the component along eigenvalue
    $h_i$ by $1 - \eta h_i$.

    **Arguments**

    - `spectrum`: the eigenvalues of the Hessian, shape [d]; any sign.
    - `seed`: draws the orthogonal `Q` (uniformly) and the start; None for `Q = I`
      and the start of seed 0.
    - `scale`: the start is `scale` times a standard normal vector.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"w": [d]}`.

    **Raises** `ValueError` if `spectrum` is no non-empty finite vector, or another is
    unfit.

    Source: textbook, e.g. Cohen et al., ICLR 2021, arXiv 2103.00065, section 2.

    ```python
    >>> import jax
    >>> problem = quadratic([3.0, 1.0])
    >>> jax.hessian(problem.loss)(problem.params)["w"]["w"].tolist()
    [[3.0, 0.0], [0.0, 1.0]]

    ```
    """
    dtype = float_dtype(dtype)
    eigenvalues = vector("spectrum", spectrum, dtype)
    check_finite("scale", [scale])
    key = jax.random.key(seed or 0)
    hessian = jnp.diag(eigenvalues)
    if seed is not None:
        # A key of its own, so that the basis is independent of the start.
        basis_key = jax.random.fold_in(key, 1)
        basis = jax.random.orthogonal(basis_key, eigenvalues.size, dtype=dtype)
        hessian = basis @ hessian @ basis.T

    def loss(params):
        return params["w"] @ hessian @ params["w"] / 2

    def draw(key):
        return {"w": scale * jax.random.normal(key, eigenvalues.shape, dtype)}

    return Problem("quadratic", loss, draw(key), draw)


def quartic_well(
    *,
    sharpness: float = 2.5,
    quartic: float = 1.0,
    initial: float = 0.1,
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""A scalar well that flattens away from its minimum.

    $L(w) = S w^2/2 - Q w^4/4$ with S the `sharpness` and Q the `quartic`. Under
    gradient descent with learning rate $\eta$ the rod flow's fixed point is $\Sigma^* =
    S/Q - 2/(\eta Q)$: beyond the edge, $\eta S > 2$, the iterates settle, for $\eta S <
    3$, on the cycle $w = \pm\sqrt{\Sigma^*}$ of two optimizer steps. The loss is
    unbounded below: iterates beyond $w^2 = S/Q$ escape.

    **Arguments**

    - `sharpness`: the second derivative at the minimum, positive.
    - `quartic`: strength of the flattening, positive.
    - `initial`: the initial parameter.
    - `dtype`: of the parameter; None for JAX's default float.

    **Returns** the problem; its parameter is one array of shape `()`.

    **Raises** `ValueError` if an argument is out of the range above, or `dtype` is
    unfit.

    Source: Regis & Chewi, arXiv 2602.01480.

    ```python
    >>> import jax
    >>> problem = quartic_well(sharpness=2.5)  # the edge for eta = 1 is at 2
    >>> w = problem.params
    >>> for _ in range(30):
    ...     w = w - 1.0 * jax.grad(problem.loss)(w)
    >>> round(float(w) ** 2, 4)  # Sigma* = 2.5 - 2
    0.5

    ```
    """
    dtype = float_dtype(dtype)
    check_positive("sharpness", sharpness)
    check_positive("quartic", quartic)
    check_finite("initial", [initial])

    def loss(w):
        return sharpness * w**2 / 2 - quartic * w**4 / 4

    return Problem("quartic well", loss, jnp.asarray(initial, dtype))


def factorization(
    dims: tuple[int, int, int],
    singular_values: Sequence[float] | ArrayLike,
    *,
    seed: int = 0,
    scale: float = 0.5,
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""Two-layer matrix factorization (a deep linear network) of a known target.

    $L(w_1, w_2) = \tfrac12 \|w_2 w_1 - A\|_F^2$ with $A = U\, \mathrm{diag}(s)\, V^T$,
    s the `singular_values`, U and V drawn with orthonormal columns. Where $w_2 w_1 = A$
    the sharpness is $\|w_1\|_2^2 + \|w_2\|_2^2$ (spectral norms), at least twice the
    largest singular value.

    **Arguments**

    - `dims`: `(d_in, h, d_out)`, positive.
    - `singular_values`: those of `A`, >= 0, shape [r], `r <= min(d_in, d_out)`; the
      minimum of the loss is 0 iff at most `h` of them are positive.
    - `seed`: draws `U`, `V` and the start.
    - `scale`: the start has independent normal entries, of standard deviation `scale /
      sqrt(fan_in)`.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"w1": [h, d_in], "w2": [d_out, h]}`.

    **Raises** `ValueError` if an argument is out of the range above, or `dtype` is
    unfit.

    Source: Saxe et al., ICLR 2014, arXiv 1312.6120.

    ```python
    >>> problem = factorization((4, 3, 2), [2.0, 1.0], scale=0.0)
    >>> problem.params["w1"].shape, problem.params["w2"].shape
    ((3, 4), (2, 3))
    >>> round(float(problem.loss(problem.params)), 4)  # (2^2 + 1^2) / 2
    2.5

    ```
    """
    dtype = float_dtype(dtype)
    if len(dims) != 3 or not all(isinstance(d, int) and d > 0 for d in dims):
        raise ValueError(f"dims={dims} must be three positive sizes (d_in, h, d_out).")
    d_in, h, d_out = dims
    values = vector("singular_values", singular_values, dtype)
    if values.size > min(d_in, d_out) or bool((values < 0).any()):
        raise ValueError(
            f"singular_values={values.tolist()} must be non-negative and at most"
            f" min(d_in, d_out)={min(d_in, d_out)} in number."
        )
    check_finite("scale", [scale])
    key = jax.random.key(seed)
    left, right, _, _ = jax.random.split(key, 4)
    u = jax.random.orthogonal(left, d_out, dtype=dtype)[:, : values.size]
    v = jax.random.orthogonal(right, d_in, dtype=dtype)[:, : values.size]
    target = u @ jnp.diag(values) @ v.T

    def loss(params):
        return jnp.sum((params["w2"] @ params["w1"] - target) ** 2) / 2

    def draw(key):
        _, _, first, second = jax.random.split(key, 4)
        w1 = scale / math.sqrt(d_in) * jax.random.normal(first, (h, d_in), dtype)
        w2 = scale / math.sqrt(h) * jax.random.normal(second, (d_out, h), dtype)
        return {"w1": w1, "w2": w2}

    return Problem("factorization", loss, draw(key), draw)


def scalar_factorization(
    *,
    target: float = 1.0,
    initial: tuple[float, float] = (2.5, 0.2),
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""Factorization of a number into two.

    $L(a, b) = \tfrac12 (a b - c)^2$, c the `target`. Its minima are the hyperbola
    $a b = c$, of sharpness $a^2 + b^2 \ge 2 |c|$; gradient flow keeps $a^2 - b^2$.

    **Arguments**

    - `target`: the number to factorize.
    - `initial`: the initial `(a, b)`.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"a": [], "b": []}`.

    **Raises** `ValueError` if `target` is not finite, or `initial` or `dtype` is
    unfit.

    Source: e.g. Wang et al., ICLR 2022, arXiv 2110.03677.

    ```python
    >>> problem = scalar_factorization(target=1.0, initial=(2.0, 1.0))
    >>> float(problem.loss(problem.params))
    0.5

    ```
    """
    dtype = float_dtype(dtype)
    check_finite("target", [target])
    check_numbers("initial", initial, 2)

    def loss(params):
        return (params["a"] * params["b"] - target) ** 2 / 2

    a, b = (jnp.asarray(v, dtype) for v in initial)
    return Problem("scalar factorization", loss, {"a": a, "b": b})
