"""What a sweep keeps on disk, so that a killed one goes on where it was."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

SETTINGS, CHECKPOINTS = "sweep.json", "checkpoints"
#: What is kept of a chunk.
ROWS, PLACES = "rows", "places"
#: Settings of which only a digest is stored, and what they stand for.
DIGESTS = {
    "params": "the values of the initial parameters",
    "program": "what is computed: loss, optimizer, flows, metrics, versions",
    "data": "the arrays that loss, optimizer, flows and metrics hold",
}


def settings_in(directory: Path) -> dict[str, Any] | None:
    """The settings of the sweep that a directory holds, `None` if it holds none.

    **Raises** `ValueError` if `directory` is a file or holds checkpoints of unknown
    settings, `ImportError` where what writes into it is not installed.
    """
    try:
        import h5netcdf  # noqa: F401
        from orbax import checkpoint  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "out= needs orbax-checkpoint and h5netcdf: pip install 'rodjax[sweep]'"
        ) from error
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"out={directory} is not a directory")
    file = directory / SETTINGS
    if not file.exists() and (directory / CHECKPOINTS).exists():
        raise ValueError(
            f"out={directory} has {CHECKPOINTS} but no {SETTINGS} to say of what: give "
            "another directory"
        )
    return json.loads(file.read_text()) if file.exists() else None


def forget(directory: Path) -> None:
    """Remove the sweep that a directory holds, if any, but not its result."""
    (directory / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def check_same(directory: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `ValueError` if two sweeps' settings differ, naming what does."""
    # As JSON gives them back; and by what they print, for NaN is not equal to itself.
    now = json.loads(_json(now))
    missing = "nothing"
    changed = [
        f"{name} is another ({DIGESTS[name]})"
        if name in DIGESTS
        else f"{name} was {stored.get(name, missing)}, is now {now.get(name, missing)}"
        for name in dict.fromkeys([*stored, *now])
        if repr(stored.get(name, missing)) != repr(now.get(name, missing))
    ]
    if changed:
        raise ValueError(
            f"out={directory} holds a sweep with other settings: {'; '.join(changed)}. "
            "Use the same settings to go on with it, or another directory"
        )


class Store:
    """Finished chunks in a directory: their rows, and the places to go on from.

    Both are checkpoints of orbax, numbered by chunk, which are there completely or not
    at all. All rows are kept, of the places only the newest.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        """Open `directory`, whose settings have been checked."""
        from orbax import checkpoint

        folder = (directory / CHECKPOINTS).absolute()
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            part = directory / f"{SETTINGS}.part"
            part.write_text(_json(settings) + "\n")
            part.replace(directory / SETTINGS)
        self._args: Any = checkpoint.args
        self._rows = _writer(folder / ROWS, keep=None)
        self._places = _writer(folder / PLACES, keep=1)
        self._reader = _reader(folder / ROWS)

    def done(self, in_block: int) -> int:
        """The number of chunks finished, of `in_block` to each chunk of lanes."""
        rows, places = self._rows.all_steps(), self._places.latest_step()
        done = next(chunk for chunk in itertools.count() if chunk not in rows)
        # Killed between its rows and its places, a chunk is done again from the last.
        while done % in_block and places != done - 1:
            done -= 1
        return done

    def save(self, chunk: int, rows: PyTree, places: PyTree | None) -> None:
        """Keep a chunk's rows, and the places unless nothing goes on from them."""
        if chunk not in self._rows.all_steps():
            # By force even before later ones.
            packed = _packed(rows, np.concatenate)
            self._rows.save(chunk, args=self._saved(ROWS, packed), force=True)
        if places is not None:
            self._places.save(chunk, args=self._saved(PLACES, _packed_on(places)))

    def rows(self, chunk: int, like: PyTree) -> PyTree:
        """The rows of a chunk, host arrays in the structure of `like`."""
        shapes = jax.eval_shape(_packed_on, like)
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return _unpacked(self._restored(self._reader, ROWS, chunk, target), like)

    def places(self, chunk: int, like: PyTree) -> PyTree:
        """The places after a chunk, laid out on devices like `like`."""
        sharding = jax.tree.map(lambda x: x.sharding, like)
        # All are spread over the devices by their lanes.
        across = jax.tree.leaves(sharding)[0]
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=across),
            jax.eval_shape(_packed_on, like),
        )
        found = self._restored(self._places, PLACES, chunk, target)
        return jax.jit(partial(_unpacked, like=like), out_shardings=sharding)(found)

    def close(self) -> None:
        """Release what orbax holds."""
        for manager in (self._rows, self._places, self._reader):
            manager.close()

    def _saved(self, name: str, packed: dict[str, Any]) -> Any:
        return self._args.Composite(**{name: self._args.StandardSave(packed)})

    def _restored(self, manager: Any, name: str, chunk: int, like: Any) -> Any:
        asked = self._args.Composite(**{name: self._args.StandardRestore(like)})
        return manager.restore(chunk, args=asked)[name]


def _writer(folder: Path, keep: int | None) -> Any:
    """Of all processes together, which read what they have written too."""
    from orbax import checkpoint

    options = checkpoint.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=True,
        # A rejected asynchronous save can hang the process at its end.
        enable_async_checkpointing=False,
    )
    return checkpoint.CheckpointManager(folder, options=options)


def _reader(folder: Path) -> Any:
    """Of this process alone: each reads rows when it needs them."""
    from orbax import checkpoint

    me = jax.process_index()
    alone = checkpoint.options.MultiprocessingOptions(me, {me}, f"process {me}")
    registry = checkpoint.handlers.DefaultCheckpointHandlerRegistry()
    handler = checkpoint.StandardCheckpointHandler(multiprocessing_options=alone)
    registry.add(ROWS, checkpoint.args.StandardRestore, handler)
    options = checkpoint.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        multiprocessing_options=alone,
    )
    return checkpoint.CheckpointManager(
        folder, options=options, handler_registry=registry
    )


def _json(settings: dict[str, Any]) -> str:
    # NumPy's numbers are written as those of Python.
    return json.dumps(settings, indent=2, default=lambda x: np.asarray(x).tolist())


def _by_dtype(tree: PyTree) -> dict[str, list[int]]:
    """The numbers of the leaves of each dtype."""
    found: dict[str, list[int]] = {}
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        found.setdefault(str(leaf.dtype), []).append(number)
    return found


def _packed(tree: PyTree, together: Callable[..., Any]) -> dict[str, Any]:
    """Arrays [lanes, ...] as one of each dtype, [lanes, n].

    Few large ones, for orbax takes its time by the array.
    """
    leaves = jax.tree.leaves(tree)
    rows = lambda x: x.reshape(len(x), math.prod(x.shape[1:]))
    return {
        name: together([rows(leaves[i]) for i in numbers], axis=1)
        for name, numbers in _by_dtype(tree).items()
    }


_packed_on = jax.jit(partial(_packed, together=jnp.concatenate))


def _unpacked(packed: dict[str, Any], like: PyTree) -> PyTree:
    """The tree that `_packed` was given."""
    leaves, structure = jax.tree.flatten(like)
    for name, numbers in _by_dtype(like).items():
        end = 0
        for i in numbers:
            start, end = end, end + math.prod(leaves[i].shape[1:])
            leaves[i] = packed[name][:, start:end].reshape(leaves[i].shape)
    return structure.unflatten(leaves)
