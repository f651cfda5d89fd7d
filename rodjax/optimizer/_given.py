"""Trees that come from elsewhere: a training loop's, a checkpoint's."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import PyTree

# Under which Flax's variables keep their arrays.
INSIDE = ("value", "raw_value")


def fitted(
    given: PyTree, like: PyTree, name: str, owner: str = "this optimizer"
) -> PyTree:
    """`given` in the structure and the dtypes of `like`, leaf by leaf of equal path.

    Containers may differ where the names in them do not: variables of Flax for arrays,
    the dicts and lists of a checkpoint for named tuples.

    `name` and `owner` are what errors call the two.

    **Raises** `ValueError` that names the leaf: one that `like` has and `given` lacks
    or the other way round, another shape, another kind of number.
    """
    have = {_names(path): (path, x) for path, x in tree_flatten_with_path(given)[0]}
    wanted, structure = tree_flatten_with_path(like)
    found = []
    for path, shape in wanted:
        if _names(path) not in have:
            near = ", ".join(keystr(p) for p, _ in have.values()) or "none"
            raise ValueError(
                f"{name} has no leaf {keystr(path)}, which {owner} has; it has "
                f"{_short(near)}. Was it made by another optimizer or model?"
            )
        found.append(_leaf(*have.pop(_names(path)), shape, name, owner))
    if have:
        path, _ = next(iter(have.values()))
        raise ValueError(
            f"{name} has a leaf {keystr(path)}, which {owner} has not. Was it made by "
            "another optimizer or model?"
        )
    return jax.tree.unflatten(structure, found)


def _leaf(path: tuple[Any, ...], x: Any, like: Any, name: str, owner: str) -> Any:
    if jnp.shape(x) != like.shape:
        raise ValueError(
            f"{name}{keystr(path)} has shape {jnp.shape(x)}, in {owner} it has "
            f"{like.shape}. Was it made by another optimizer or model?"
        )
    if jnp.issubdtype(like.dtype, jax.dtypes.extended):
        return x
    kinds = jnp.floating, jnp.integer, jnp.bool
    kind = lambda dtype: next((k for k in kinds if jnp.issubdtype(dtype, k)), None)
    # A counter may come as a float, as flows carry it.
    counts = kind(like.dtype) is jnp.integer and kind(jnp.result_type(x)) is not None
    if kind(jnp.result_type(x)) is not kind(like.dtype) and not counts:
        raise ValueError(
            f"{name}{keystr(path)} has dtype {jnp.result_type(x)}, in {owner} it has "
            f"{like.dtype}"
        )
    return jnp.asarray(x, like.dtype)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """What a path is called whatever containers it leads through."""
    fields = ("name", "key", "idx")
    names = [
        str(next(getattr(key, f) for f in fields if hasattr(key, f))) for key in path
    ]
    return tuple(names[:-1] if names and names[-1] in INSIDE else names)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
