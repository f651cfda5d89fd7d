"""What a sweep keeps on disk, so that a killed one goes on where it was."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

SETTINGS = "sweep.json"


def settings_in(directory: Path) -> dict[str, Any] | None:
    """The settings of the sweep that a directory holds, `None` if it holds none.

    **Raises** `ValueError` if `directory` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"out={directory} is not a directory")
    file = directory / SETTINGS
    return json.loads(file.read_text()) if file.exists() else None


def check_same(directory: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `ValueError` if two sweeps' settings differ, naming what does."""
    # As JSON gives them back, tuples are lists.
    now = json.loads(json.dumps(now))
    missing = "nothing"
    changed = [
        f"{name} was {stored.get(name, missing)}, is now {now.get(name, missing)}"
        for name in dict.fromkeys([*stored, *now])
        if stored.get(name, missing) != now.get(name, missing)
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
        """Open `directory`. Raises `ImportError` without orbax."""
        try:
            from orbax import checkpoint
        except ImportError as error:
            raise ImportError(
                "out= needs orbax-checkpoint: pip install 'rodjax[sweep]'"
            ) from error

        def manager(name: str, keep: int | None) -> Any:
            options = checkpoint.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # A rejected asynchronous save can hang the process at its end.
                enable_async_checkpointing=False,
            )
            path = (directory / "checkpoints" / name).absolute()
            return checkpoint.CheckpointManager(path, options=options)

        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            part = directory / f"{SETTINGS}.part"
            part.write_text(json.dumps(settings, indent=2) + "\n")
            part.replace(directory / SETTINGS)
        self._args: Any = checkpoint.args
        self._rows, self._places = manager("rows", None), manager("places", 1)

    def done(self, in_block: int) -> int:
        """The number of chunks finished, of `in_block` to each chunk of lanes."""
        last = self._rows.latest_step()
        if last is None:
            return 0
        # Killed between its rows and its places, a chunk is done again from the last.
        whole = (last + 1) % in_block == 0 or self._places.latest_step() == last
        return last + 1 if whole else last

    def save(self, chunk: int, rows: PyTree, places: PyTree | None) -> None:
        """Keep a chunk's rows, and the places unless nothing goes on from them."""
        if chunk not in self._rows.all_steps():
            self._rows.save(chunk, args=self._args.StandardSave(_flat(rows)))
        if places is not None:
            self._places.save(chunk, args=self._args.StandardSave(_flat(places)))

    def rows(self, chunk: int, like: PyTree) -> PyTree:
        """The rows of a chunk, host arrays in the structure of `like`."""
        target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return self._restored(self._rows, chunk, target)

    def places(self, chunk: int, like: PyTree) -> PyTree:
        """The places after a chunk, laid out on devices like `like`."""
        return self._restored(self._places, chunk, like)

    def close(self) -> None:
        """Release what orbax holds."""
        self._rows.close()
        self._places.close()

    def _restored(self, manager: Any, chunk: int, like: PyTree) -> PyTree:
        target = self._args.StandardRestore(_flat(like))
        found = manager.restore(chunk, args=target)
        return jax.tree.unflatten(
            jax.tree.structure(like), [found[name] for name in sorted(found)]
        )


def _flat(tree: PyTree) -> dict[str, Any]:
    """The leaves by number: empty nodes and `None` need no representation."""
    return {f"{i:06}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
