"""Full-batch training of a model on labelled samples, in bounded memory if asked."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from rodjax.problems._base import Data, Problem
from rodjax.problems._chunked import chunked_mean

#: Function from a `jax.random` key to a model: inputs [m, ...] to outputs.
Build = Callable[[Array], Callable[[Array], Array]]

Loss = Literal["mse", "cross-entropy"]


def _half_squared_error(
    outputs: Float[Array, "*n classes"], targets: Float[Array, "*n classes"]
) -> Float[Array, "*n"]:
    return jnp.sum((outputs - targets) ** 2, axis=-1) / 2


LOSSES: Mapping[str, Callable[[Array, Array], Array]] = {
    "mse": _half_squared_error,
    "cross-entropy": optax.softmax_cross_entropy,
}


def supervised(
    build: Build,
    data: Data,
    *,
    loss: Loss = "mse",
    seed: int = 0,
    chunk: int | None = None,
    name: str = "supervised",
) -> Problem:
    """Full-batch training of a Flax (nnx) model on `data`.

    The loss is the mean over the samples, and over the outputs of each if it has
    several, of `||outputs - targets||^2 / 2` (`"mse"`) or of the softmax cross
    entropy (`"cross-entropy"`, `optax.softmax_cross_entropy`).

    **Arguments**

    - `build`: function from a `jax.random` key to an `nnx.Module` that maps inputs
      [m, ...] to outputs shaped as the targets. All its state must be parameters: no
      batch statistics, no dropout.
    - `data`: the samples.
    - `loss`: `"mse"` or `"cross-entropy"`.
    - `seed`: of the key given to `build`.
    - `chunk`: samples at a time, see `chunked_mean`; None for all at once.
    - `name`: of the problem.

    **Returns** the problem, with the metric `accuracy`; its parameters are the nested
    dict `nnx.to_pure_dict(nnx.state(model))`. `draw(key)` are those of
    `build(key)`.

    **Raises** `ValueError` if an argument is out of range or not one of the choices,
    `build` makes a model with other state than parameters, or one whose outputs do
    not have the targets' shape.

    Source: the full-batch setting of Cohen et al., ICLR 2021, arXiv 2103.00065.

    ```python
    >>> import jax, rodjax as rj
    >>> from flax import nnx
    >>> data = rj.problems.clusters(20, shape=(4,), classes=3)
    >>> build = lambda key: nnx.Linear(4, 3, rngs=nnx.Rngs(key))
    >>> problem = supervised(build, data)
    >>> jax.tree.map(lambda x: x.shape, problem.params)
    {'bias': (3,), 'kernel': (4, 3)}

    ```
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is unknown: give one of {list(LOSSES)}.")
    per_output = LOSSES[loss]

    def split(key: Array) -> tuple[Any, PyTree]:
        graph, state, other = nnx.split(build(key), nnx.Param, ...)
        if found := nnx.to_flat_state(other):
            path = ".".join(map(str, found[0][0]))
            raise ValueError(
                f"build makes a model whose {path} is no parameter: the loss must be a"
                " function of the parameters alone, so use no dropout and normalize by"
                " layers, not batches."
            )
        return graph, nnx.to_pure_dict(state)

    graph, params = split(jax.random.key(seed))
    outputs = jax.eval_shape(lambda p: nnx.merge(graph, p)(data.inputs), params)
    if outputs.shape != data.targets.shape:
        raise ValueError(
            f"the model of build gives outputs of shape {outputs.shape} where the"
            f" targets have {data.targets.shape}: make them agree."
        )

    def mean_of(values: Callable[[Array, Array], Array]) -> Callable[[PyTree], Array]:
        def mean(params: PyTree) -> Array:
            model = nnx.merge(graph, params)

            def of_samples(piece: Data) -> Array:
                found = values(model(piece.inputs), piece.targets)
                return jnp.mean(found, axis=tuple(range(1, found.ndim)))

            return chunked_mean(of_samples, data, chunk=chunk)

        return mean

    def right(outputs: Array, targets: Array) -> Array:
        same = jnp.argmax(outputs, -1) == jnp.argmax(targets, -1)
        return same.astype(targets.dtype)

    mean_loss = mean_of(per_output)
    # To refuse here what would be refused in the midst of a run.
    jax.eval_shape(mean_loss, params)
    return Problem(
        name,
        mean_loss,
        params,
        lambda key: split(key)[1],
        {"accuracy": mean_of(right)},
    )


def image_shape(data: Data) -> tuple[int, int, int]:
    """Height, width and channels of the inputs; `ValueError` if they are no images."""
    shape = data.inputs.shape[1:]
    if len(shape) != 3:
        raise ValueError(
            f"data has inputs of shape {data.inputs.shape}: images must be"
            " [n, height, width, channels]."
        )
    return cast(tuple[int, int, int], shape)
