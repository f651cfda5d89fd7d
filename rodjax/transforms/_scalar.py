"""RMSProp, Adam and NAdam with one scalar second moment for the whole gradient.

Each is its Optax namesake with the per-component second moment replaced by the EMA
of ||g||^2, the sum running over every entry of every leaf. Unlike the per-component
optimizers these commute with orthogonal changes of the parameters; with a single
scalar parameter they are exactly the Optax optimizers.

Sources: RMSProp from Cohen et al., "Understanding Optimization in Deep Learning with
Central Flows", ICLR 2025, arXiv 2410.24206; Adam from Regis & Chewi, arXiv 2605.06821.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from rodjax.transforms._extra import check_numbers, joint_scalar


class ScaleByScalarRmsWithCountState(NamedTuple):
    """State of `scale_by_scalar_rms` with bias correction.

    `count` (int or float, shape `()`) is the number of optimizer steps taken,
    `nu` (shape `()`) the scalar second moment. Optax has the like but does
    not export it.

    ```python
    >>> import jax.numpy as jnp
    >>> state = scale_by_scalar_rms(bias_correction=True).init(jnp.ones(3))
    >>> state._fields, state.nu.shape
    (('count', 'nu'), ())

    ```
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride] (as Optax)
    nu: Float[Array, ""]


def _update_nu(
    updates: PyTree, nu: Float[Array, ""], decay: ArrayLike
) -> Float[Array, ""]:
    """EMA of the squared norm of the whole gradient."""
    # Cast first: leaves may differ in dtype, which strict promotion refuses to join.
    squared = optax.tree.norm(optax.tree.cast(updates, nu.dtype), squared=True)
    return optax.tree.update_moment(squared, nu, decay, 1)


def _debias(moment: PyTree, decay: ArrayLike, count: ArrayLike) -> PyTree:
    # Optax raises a float to the power of the (integer) count: mixed by design.
    with jax.numpy_dtype_promotion("standard"):
        return optax.tree.bias_correction(moment, decay, count)


def scale_by_scalar_rms(
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    """Divide the gradient by the root of the EMA of its squared norm.

    With `g_t` the gradient at step `t = 1, 2, ...` and `nu_0 = initial_scale`:

        nu_t = decay nu_{t-1} + (1 - decay) ||g_t||^2
        n_t = nu_t / (1 - decay^t) if bias_correction else nu_t
        u_t = g_t / sqrt(n_t + eps) if eps_in_sqrt else g_t / (sqrt(n_t) + eps)

    As `optax.scale_by_rms` apart from the scalar `nu`.

    **Arguments**

    - `decay`: decay rate per step, in [0, 1); memory about `1 / (1 - decay)` steps.
    - `eps`: added in the denominator, >= 0.
    - `initial_scale`: value of `nu` before the first step, >= 0.
    - `eps_in_sqrt`: whether `eps` stands inside the square root.
    - `bias_correction`: whether to divide `nu` by `1 - decay^t`.

    **Returns** a transformation from gradients to updates of the same shapes and
    dtypes, with state `optax.ScaleByRmsState`
    (`ScaleByScalarRmsWithCountState` with `bias_correction`); `nu` has shape
    `()`, dtype of the parameters.

    **Raises** `ValueError` if a number is out of range, or `params` is empty or not
    real.

    Source: Cohen et al., ICLR 2025, arXiv 2410.24206.

    ```python
    >>> import jax.numpy as jnp
    >>> tx, grad = scale_by_scalar_rms(decay=0.0, eps=0.0), jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(grad, tx.init(grad))
    >>> [round(u, 4) for u in updates.tolist()], float(state.nu)
    ([0.6, 0.8], 25.0)

    ```
    """
    check_numbers({"decay": decay}, {"eps": eps, "initial_scale": initial_scale})

    def init_fn(params):
        nu = joint_scalar(params, initial_scale)
        if bias_correction:
            return ScaleByScalarRmsWithCountState(count=jnp.zeros([], jnp.int32), nu=nu)
        return optax.ScaleByRmsState(nu=nu)

    def update_fn(updates, state, params=None):
        del params
        nu = _update_nu(updates, state.nu, decay)
        if bias_correction:
            count = optax.safe_increment(state.count)
            nu_hat = _debias(nu, decay, count)
            new_state = ScaleByScalarRmsWithCountState(count=count, nu=nu)
        else:
            nu_hat = nu
            new_state = optax.ScaleByRmsState(nu=nu)
        if eps_in_sqrt:
            scaling = jax.lax.rsqrt(nu_hat + eps)
        else:
            scaling = 1 / (jnp.sqrt(nu_hat) + eps)
        return jax.tree.map(lambda g: scaling.astype(g.dtype) * g, updates), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def scalar_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    """RMSProp with one scalar second moment for the whole gradient.

    `w_{t+1} = w_t - learning_rate u_t` with `u_t` from
    `scale_by_scalar_rms`, whose arguments, shapes, errors and source these
    are; as `optax.rmsprop` without centring and momentum, apart from the
    scalar `nu`. `learning_rate` is a number, a (traced) scalar array of the dtype
    of the parameters, or a schedule from optimizer steps taken to the rate.

    ```python
    >>> import jax.numpy as jnp
    >>> tx, grad = scalar_rmsprop(0.1, decay=0.0, eps=0.0), jnp.array([3.0, 4.0])
    >>> [round(u, 4) for u in tx.update(grad, tx.init(grad))[0].tolist()]
    [-0.06, -0.08]

    ```
    """
    return optax.chain(
        scale_by_scalar_rms(decay, eps, initial_scale, eps_in_sqrt, bias_correction),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_scalar_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Rescale the gradient as Adam does, with a scalar second moment.

    With `g_t` the gradient at optimizer step `t = 1, 2, ...`:

        mu_t = b1 mu_{t-1} + (1 - b1) g_t            (per component)
        nu_t = b2 nu_{t-1} + (1 - b2) ||g_t||^2      (one scalar)
        m_t = mu_t / (1 - b1^t), or, with nesterov,
              b1 mu_t / (1 - b1^(t+1)) + (1 - b1) g_t / (1 - b1^t)
        u_t = m_t / (sqrt(nu_t / (1 - b2^t) + eps_root) + eps)

    As `optax.scale_by_adam` apart from the scalar `nu`.

    **Arguments**

    - `b1`, `b2`: decay rates per step of the first and second moment, in [0, 1).
    - `eps`, `eps_root`: added outside and inside the square root, >= 0.
    - `mu_dtype`: dtype of the stored first moment; None for that of the parameters.
    - `nesterov`: whether to use Nesterov momentum (NAdam).

    **Returns** a transformation from gradients to updates of the same shapes, with
    state `optax.ScaleByAdamState`: `count` the steps taken (int32, but a float
    works), `mu` shaped as the parameters, `nu` of shape `()`.

    **Raises** `ValueError` if a number is out of range, or `params` is empty or not
    real.

    Source: Regis & Chewi, arXiv 2605.06821.

    ```python
    >>> import jax.numpy as jnp
    >>> tx, grad = scale_by_scalar_adam(eps=0.0), jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(grad, tx.init(grad))
    >>> [round(u, 4) for u in updates.tolist()], state.nu.shape
    ([0.6, 0.8], ())

    ```
    """
    check_numbers({"b1": b1, "b2": b2}, {"eps": eps, "eps_root": eps_root})

    def init_fn(params):
        nu = joint_scalar(params, 0.0)
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        # mu_dtype may differ from the dtype of the gradient, as Optax allows.
        with jax.numpy_dtype_promotion("standard"):
            mu = optax.tree.update_moment(updates, state.mu, b1, 1)
            if nesterov:
                m_hat = jax.tree.map(
                    lambda m, g: b1 * m + (1 - b1) * g,
                    _debias(mu, b1, optax.safe_increment(count)),
                    _debias(updates, b1, count),
                )
            else:
                m_hat = _debias(mu, b1, count)
        nu = _update_nu(updates, state.nu, b2)
        denominator = jnp.sqrt(_debias(nu, b2, count) + eps_root) + eps
        updates = jax.tree.map(lambda m: m / denominator.astype(m.dtype), m_hat)
        mu = optax.tree.cast_like(mu, state.mu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init_fn, update_fn)


def scalar_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Adam with one scalar second moment for the whole gradient.

    `w_{t+1} = w_t - learning_rate u_t` with `u_t` from
    `scale_by_scalar_adam`, whose arguments, shapes, errors and source these
    are; as `optax.adam` apart from the scalar `nu`. `learning_rate` is a
    number, a (traced) scalar array of the dtype of the parameters, or a schedule from
    optimizer steps taken to the rate.

    ```python
    >>> import jax.numpy as jnp
    >>> tx, grad = scalar_adam(0.1, eps=0.0), jnp.array([3.0, 4.0])
    >>> [round(u, 4) for u in tx.update(grad, tx.init(grad))[0].tolist()]
    [-0.06, -0.08]

    ```
    """
    return optax.chain(
        scale_by_scalar_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def scalar_nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """NAdam with one scalar second moment: `scalar_adam`, `nesterov=True`.

    As `optax.nadam` apart from the scalar `nu`; formula, arguments, shapes,
    errors and source are those of `scalar_adam`.

    ```python
    >>> import jax.numpy as jnp
    >>> tx, grad = scalar_nadam(0.1, b1=0.0, eps=0.0), jnp.array([3.0, 4.0])
    >>> [round(u, 4) for u in tx.update(grad, tx.init(grad))[0].tolist()]
    [-0.06, -0.08]

    ```
    """
    return scalar_adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=True)
