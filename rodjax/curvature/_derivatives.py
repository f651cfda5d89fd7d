"""Derivatives of a loss along directions, by nested jvp of its gradient."""

import jax
from jaxtyping import PyTree

from rodjax.optimizer import Loss, for_loops


def hvp(loss: Loss, params: PyTree, vector: PyTree) -> PyTree:
    """Hessian-vector product H(params) vector, as the jvp of the gradient.

    `vector` and the result have the structure and shapes of `params`.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> rj.hvp(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]), jnp.ones(2)).tolist()
    [6.0, 12.0]

    ```
    """
    return jax.jvp(for_loops(jax.grad(loss)), (params,), (vector,))[1]


def third_derivative(loss: Loss, params: PyTree, u: PyTree, v: PyTree) -> PyTree:
    r"""Third derivative applied to two vectors: $T[u, v] = \nabla_w (u^T H(w) v)$.

    As nested jvps of the gradient. Symmetric in u and v, which have the structure and
    shapes of `params`, as has the result. T[u, u] is the gradient of the curvature
    $u^T H u$ along a fixed u.

    ```python
    >>> import jax.numpy as jnp, rodjax as rj
    >>> w, u, v = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> rj.third_derivative(lambda w: jnp.sum(w**3), w, u, v).tolist()
    [18.0, 48.0]

    ```
    """
    return jax.jvp(lambda w: hvp(loss, w, u), (params,), (v,))[1]
