"""Berthier's three examples of progressive sharpening and its end at the edge.

Each is `L = g + eps h`: `g` vanishes to second order at `x = 0`, so that its
minima are the whole plane `x = 0`, over which `y` drifts along `-grad h` by
`eta eps` per optimizer step until the sharpness reaches `2 / eta`.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from rodjax.problems._base import Problem, float_dtype
from rodjax.problems._checks import check_finite, check_numbers, check_positive


def berthier(
    *,
    eps: float = 0.01,
    zeta: float = 1.0,
    initial: tuple[float, float] = (0.0, 5.0),
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""The minimal example of progressive sharpening and self-stabilization.

    $$L(x, y) = \tfrac12 (y + \zeta x)\, x^2 - \varepsilon (x + y)$$

    Per optimizer step of gradient descent (learning rate $\eta$) the forcing raises
    $y$, the sharpness at $x = 0$, by $\eta\varepsilon$; an oscillation of $x$ lowers
    it by $\eta x^2/2$. In $t_2 = \sqrt\varepsilon\, t$, $x = \sqrt\varepsilon\,
    (-1)^t a$, $y = 2/\eta + \sqrt\varepsilon\, u$, near the edge,

    $$a' = \eta a u, \qquad u' = \eta (1 - a^2/2),$$

    which conserves $E = u^2/2 + a^2/4 - \tfrac12 \log a^2 \ge (1 - \log 2)/2$. On the
    scale $\varepsilon t$ the swings are damped iff $\zeta^2 > 2/9$, and end on a cycle
    of two optimizer steps $c \pm d$ in $x$, of mean square $2\varepsilon$, at a mean
    $y$ of $2/\eta - 3\zeta c - \eta c^2/2$, where $c$, about $-\eta\varepsilon (3\zeta
    - 1)/2$, solves $c\, (2/\eta + \eta\varepsilon - 3\zeta c - \eta c^2) = \varepsilon
    (1 - 3\zeta)$.

    At the default arguments and $\eta = 0.3$ the sharpness passes $2/\eta$ at step
    555; $y$ goes up to 7.58 and settles at 6.676. The height of the overshoot is that
    of float64: below the edge the oscillation dies down to rounding errors, from which
    it must grow again. In float32 it is lower. The loss is unbounded below: wide swings
    of $x$ escape.

    **Arguments**

    - `eps`: the forcing, positive; 0.01 to 0.00001 in the source.
    - `zeta`: how fast the sharpness changes along `x`, a third of that rate.
    - `initial`: the initial `(x, y)`.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"x": [], "y": []}`.

    **Raises** `ValueError` if `eps` is not positive, or another argument is unfit.

    Source: Berthier, arXiv 2609.01034.

    ```python
    >>> problem = berthier(initial=(2.0, 5.0))
    >>> round(float(problem.loss(problem.params)), 4)  # (5 + 2) 4/2 - 0.01 * 7
    13.93

    ```
    """
    dtype = float_dtype(dtype)
    check_positive("eps", eps)
    check_finite("zeta", [zeta])
    check_numbers("initial", initial, 2)

    def loss(params):
        x, y = params["x"], params["y"]
        return (y + zeta * x) * x**2 / 2 - eps * (x + y)

    x, y = (jnp.asarray(v, dtype) for v in initial)
    return Problem("berthier", loss, {"x": x, "y": y})


def berthier_circle(
    *,
    eps: float = 0.01,
    initial: tuple[float, float, float] = (0.0, 0.0, 2.0),
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""Three parameters: the edge is a circle, along which the slow motion goes on.

    $$L(x, y) = \tfrac12 (|y| + 3 e^{x/2})\, x^2 - \varepsilon (x + y_1)$$

    with $y$ in the plane, of sharpness $S = |y| + 3$ at $x = 0$: an edge of codimension
    one. Away from it $y_1$ rises by $\eta\varepsilon$ per optimizer step of gradient
    descent. At it, with $h = -x - y_1$, both gradients along $y$, and $a$, $u$ (of
    $S$) and $t_2$ as in `berthier`, it holds in general that

    $$a' = \eta a u, \qquad
      u' = -\eta \left( \nabla h \cdot \nabla S + \tfrac12 |\nabla S|^2 a^2 \right).$$

    Here $u' = \eta (\cos\theta - a^2/2)$, $\theta$ the angle of $y$. As $\varepsilon
    \to 0$ the motion at the edge becomes the gradient flow of $\varepsilon h$
    constrained to the circle of radius $R = 2/\eta - 3$, on which $\tan(\theta/2)$
    decays at the rate $\eta\varepsilon/R$.

    **Arguments**

    - `eps`: the forcing, positive; 0.01, 0.001 and 0.0001 in the source.
    - `initial`: the initial `(x, y_1, y_2)`. The default begins at a sharpness of 5,
      as `berthier` does, and reaches the edge of `eta = 0.3` at an angle of 33
      degrees; the choice is ours.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"x": [], "y": [2]}`.

    **Raises** `ValueError` if `eps` is not positive, the initial `y` is zero, where
    `|y|` is not differentiable, or another argument is unfit.

    Source: Berthier, arXiv 2609.01034.

    ```python
    >>> problem = berthier_circle(initial=(0.0, 3.0, 4.0))
    >>> import jax
    >>> float(jax.hessian(problem.loss)(problem.params)["x"]["x"])  # |y| + 3
    8.0

    ```
    """
    dtype = float_dtype(dtype)
    check_positive("eps", eps)
    check_numbers("initial", initial, 3)
    if not any(initial[1:]):
        raise ValueError(f"initial={initial} has y = 0: begin elsewhere.")

    def loss(params):
        x, y = params["x"], params["y"]
        sharpness = jnp.linalg.norm(y) + 3 * jnp.exp(x / 2)
        return sharpness * x**2 / 2 - eps * (x + y[0])

    begin = jnp.asarray(initial, dtype)
    return Problem("berthier circle", loss, {"x": begin[0], "y": begin[1:]})


def berthier_matrix(
    *,
    eps: float = 0.01,
    initial: tuple[float, float, float, float, float] = (0.0, 0.0, 5.0, 5.0, 0.0),
    dtype: DTypeLike | None = None,
) -> Problem:
    r"""Five parameters: two eigenvalues reach the edge and stay there.

    $$L(x, y) = \tfrac12 \left( x^T H(y)\, x + x_1^3 + x_2^3 \right)
      - \varepsilon (x_1 + 2 y_1 + y_2 + y_3), \qquad
      H = \begin{pmatrix} y_1 & y_3/\sqrt2 \\ y_3/\sqrt2 & y_2 \end{pmatrix}$$

    Where both eigenvalues are at the edge, $H = 2/\eta$, there is an edge of
    codimension two whose oscillation may point anywhere. With $x = \sqrt\varepsilon\,
    (-1)^t A$, $H = 2/\eta + \sqrt\varepsilon\, U$ and $t_2 = \sqrt\varepsilon\, t$
    gradient descent (learning rate $\eta$) follows there

    $$A' = \eta U A, \qquad
      U' = -\eta \left( \Psi \nabla h + \tfrac12 \Psi \Psi^* [A A^T] \right),$$

    in which $h = -x_1 - 2 y_1 - y_2 - y_3$ and $\Psi$, the derivative of $H$, here
    keeps lengths: $\Psi \Psi^*$ is the identity, and $\Psi \nabla h = -C$ with

    $$C = \begin{pmatrix} 2 & 1/\sqrt2 \\ 1/\sqrt2 & 1 \end{pmatrix}.$$

    As $A A^T$ has rank one and $C$ two, the oscillation never settles; its mean square
    is $\langle x x^T \rangle = 2 \varepsilon C$.

    **Arguments**

    - `eps`: the forcing, positive; 0.01 in the source.
    - `initial`: the initial `(x_1, x_2, y_1, y_2, y_3)`. The default begins at a
      sharpness of 5, as `berthier` does; the choice is ours.
    - `dtype`: of the parameters; None for JAX's default float.

    **Returns** the problem, with parameters `{"x": [2], "y": [3]}`.

    **Raises** `ValueError` if `eps` is not positive, or another argument is unfit.

    Source: Berthier, arXiv 2609.01034.

    ```python
    >>> import jax, math
    >>> problem = berthier_matrix(initial=(0.0, 0.0, 4.0, 4.0, math.sqrt(2)))
    >>> jax.hessian(problem.loss)(problem.params)["x"]["x"].round(4).tolist()
    [[4.0, 1.0], [1.0, 4.0]]

    ```
    """
    dtype = float_dtype(dtype)
    check_positive("eps", eps)
    check_numbers("initial", initial, 5)

    def loss(params):
        x, y = params["x"], params["y"]
        off = y[2] / 2**0.5
        square = y[0] * x[0] ** 2 + 2 * off * x[0] * x[1] + y[1] * x[1] ** 2
        forcing = x[0] + 2 * y[0] + y[1] + y[2]
        return (square + jnp.sum(x**3)) / 2 - eps * forcing

    begin = jnp.asarray(initial, dtype)
    return Problem("berthier matrix", loss, {"x": begin[:2], "y": begin[2:]})
