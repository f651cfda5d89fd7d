"""The checkpoints that a training loop left in a directory, one after the other."""

from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rodjax.optimizer import fitted

#: The folder of what is saved without a name of its own.
DEFAULT = "default"
# By which a folder is one of a tree.
METADATA = "_METADATA"


class Checkpoint(NamedTuple):
    """What a training loop saved.

    - `step`: optimizer steps that had been taken.
    - `params`, `opt_state`: as the template has them.
    """

    step: int
    params: PyTree
    opt_state: PyTree


def checkpoints(
    directory: str | Path,
    template: PyTree = None,
    *,
    steps: Container[int] | None = None,
    pick: Callable[[Any], tuple[PyTree, PyTree]] | None = None,
) -> Iterator[Checkpoint]:
    """The finished checkpoints in a directory of orbax, in the order of their steps.

    Each is read when it is come to, so that one at a time is in memory. A directory is
    as `orbax.checkpoint.CheckpointManager` lays it out, a folder for each step, saved
    with `StandardSave` or `PyTreeSave`, of one tree or of named items.

    **Arguments**

    - `directory`: where the manager saved to.
    - `template`: what was saved, in the structure, shapes and dtypes that it is to
      come back in: a dict, or an object such as `TrainState`, of arrays or of
      `jax.ShapeDtypeStruct`. Arrays say where theirs go, too. What else was saved
      beside its entries is left out. `None`: dicts and lists of arrays of the host,
      which `rodjax.training.window` and `inspect` take as well.
    - `steps`: which steps, such as `range(900, 1000)` or a set; all by default.
    - `pick`: from such a tree to the parameters and the optimizer's state, by default
      its `params` and `opt_state`; of `flax.nnx` for instance
      `lambda saved: (saved["model"], saved["optimizer"]["opt_state"])`.

    **Returns** an iterator of `Checkpoint(step, params, opt_state)`.

    **Raises** `FileNotFoundError` without such a directory; `ValueError` if it has no
    finished checkpoint, or none of those `steps`, or `template` has neither of the two
    parts, and, when one is come to, if it is of another model or optimizer, naming the
    leaf; `ImportError` without orbax (`rodjax[sweep]`).

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj, tempfile
    >>> import orbax.checkpoint as ocp
    >>> params, optimizer = jnp.array([1.0, -2.0]), optax.adam(0.1)
    >>> saved = {"params": params, "opt_state": optimizer.init(params)}
    >>> dynamics = rj.dynamics(optimizer, lambda w: jnp.sum(w**4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:  # in a training loop
    ...         _ = manager.save(100, args=ocp.args.StandardSave(saved))
    ...     for step, params, opt_state in rj.training.checkpoints(folder, saved):
    ...         start = rj.training.window(dynamics, params, opt_state, step=step)
    >>> rj.descend(dynamics, start, 2).steps.tolist()
    [103.0, 104.0, 105.0]

    ```
    """
    try:
        from orbax import checkpoint
    except ImportError as error:
        raise ImportError(
            "checkpoints needs orbax-checkpoint: pip install 'rodjax[sweep]'"
        ) from error
    folder = Path(directory).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    pick = _parts if pick is None else pick
    try:
        if template is not None:
            pick(template)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"template has no {error}: give a tree with params and opt_state, or say "
            "by pick= where they are"
        ) from error
    layout = checkpoint.path.step
    found = {
        layout.step_from_checkpoint_name(path.name): Path(path)
        for path in layout.checkpoint_steps_paths(folder)
    }
    if not found:
        raise ValueError(f"{directory} has no finished checkpoint of orbax in it")
    chosen = {n: found[n] for n in sorted(found) if steps is None or n in steps}
    if not chosen:
        there = ", ".join(map(str, sorted(found)))
        raise ValueError(
            f"{directory} has no checkpoint of those steps, only of {there}"
        )
    return _read(chosen, template, pick)


def _read(
    folders: Mapping[int, Path],
    template: PyTree,
    pick: Callable[[Any], tuple[PyTree, PyTree]],
) -> Iterator[Checkpoint]:
    for step, folder in folders.items():
        whole = (folder / DEFAULT).is_dir()
        saved = _saved(folder / DEFAULT) if whole else _items(folder, template)
        if template is not None:
            saved = _like(saved, template, f"checkpoint {step}")
        try:
            parts = pick(saved)
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"checkpoint {step} has no {error}: say by pick= where in it the "
                "parameters and the optimizer's state are"
            ) from error
        yield Checkpoint(step, *parts)


def _items(folder: Path, template: PyTree) -> dict[str, Any]:
    """Those that the template has, or all that are trees, of a tree saved in parts."""
    there = {path.name: path for path in folder.iterdir() if path.is_dir()}
    if template is None:
        return {k: _saved(v) for k, v in there.items() if (v / METADATA).is_file()}
    return {name: _saved(there[name]) for name in _entries(template) if name in there}


def _saved(folder: Path) -> PyTree:
    """The tree in a folder: dicts and lists of host arrays."""
    from orbax import checkpoint

    handler: Any = checkpoint.PyTreeCheckpointHandler()
    shapes = handler.metadata(folder).tree
    # Not on the devices that it was saved from: this machine may have others.
    plain = checkpoint.RestoreArgs(restore_type=np.ndarray)
    given = jax.tree.map(lambda _: plain, shapes)
    asked = checkpoint.args.PyTreeRestore(item=shapes, restore_args=given)
    return handler.restore(folder, args=asked)


def _like(saved: PyTree, template: PyTree, name: str) -> PyTree:
    """What was saved, as the template has it, and on the devices of its arrays."""
    wanted = _entries(template)
    if wanted and isinstance(saved, Mapping):
        saved = {key: value for key, value in saved.items() if key in wanted}
    whole = lambda x: x if hasattr(x, "dtype") else jnp.asarray(x)
    found = fitted(saved, jax.tree.map(whole, template), name, "the template")
    place = lambda x, like: (
        jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x
    )
    return jax.tree.map(place, found, template)


def _entries(template: PyTree) -> set[str]:
    """What the tree's uppermost branches are called."""
    paths = jax.tree_util.tree_leaves_with_path(template)
    return {jax.tree_util.keystr(path[:1], simple=True) for path, _ in paths if path}


def _parts(tree: Any) -> tuple[PyTree, PyTree]:
    if isinstance(tree, Mapping):
        return tree["params"], tree["opt_state"]
    return tree.params, tree.opt_state
