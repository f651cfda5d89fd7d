"""The loop of a sweep: chunks of lanes, and of time within each, resumed if stored."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from rodjax.solve import RUN
from rodjax.sweeps import _table as table
from rodjax.sweeps._grid import Grid
from rodjax.sweeps._lanes import Rows, Spec, models
from rodjax.sweeps._program import Devices, Program, get, mesh_of, put, shardings
from rodjax.sweeps._store import Store


class Status(NamedTuple):
    """How far a sweep is, after a chunk.

    - `lanes`: of the grid; `diverged`: those so far in which the optimizer diverged,
      the others being alive.
    - `done`, `total`: optimizer steps of all lanes, those before the start included.
    - `resumed`: of `done`, what an earlier call had done.
    - `seconds`: since this call began its first chunk.
    - `program`: what computes each chunk: its lanes, its memory, how long it took to
      compile.
    """

    lanes: int
    diverged: int
    done: int
    total: int
    resumed: int
    seconds: float
    program: Program


class Blocks:
    """The chunks of one sweep; a block is all of time for one chunk of lanes."""

    def __init__(
        self,
        spec: Spec,
        program: Program,
        grid: Grid,
        moments: int,
        devices: Devices,
        store: Store | None,
    ):
        self.spec, self.program, self.grid, self.store = spec, program, grid, store
        self.devices = devices
        whole, rest = divmod(moments, program.length)
        #: Moments of every chunk of time.
        self.counts = [program.length] * whole + ([rest] if rest else [])
        self.blocks = -(-grid.lanes // program.lanes)
        self.computed: list[Rows] = []

    def run(
        self, params: PyTree, progress: Callable[[Status], None] | None = None
    ) -> None:
        """Compute what is not stored yet."""
        each, program = len(self.counts), self.program
        across, alike = shardings(mesh_of(self.devices))
        params = put(params, alike)
        done = self.store.done(each) if self.store else 0
        meter = _Meter(self, progress)
        places = None
        for chunk in range(self.blocks * each):
            block, part = divmod(chunk, each)
            if chunk < done:
                # Only the last of a block is needed to count what has diverged.
                if part == each - 1 or chunk == done - 1:
                    meter.diverged(block, self._stored(chunk))
                meter.skip(block, part)
                continue
            if part == 0:
                places = put(_zeros(program.places), across)
            elif places is None and self.store:
                places = self.store.places(chunk - 1, program.places)
            points = self.grid.points(block * program.lanes, program.lanes)
            meter.start()
            fresh, count = np.bool_(part == 0), np.int32(self.counts[part])
            places, rows = program.run(
                params, put(points, across), places, *put((fresh, count), alike)
            )
            rows = get(rows)
            if self.store:
                self.store.save(chunk, rows, places if part < each - 1 else None)
            else:
                self.computed.append(rows)
            meter.diverged(block, rows)
            meter.count(block, part)

    def __iter__(self) -> Iterator[table.Block]:
        """Every block's variables, lanes beyond the grid's end included."""
        each = len(self.counts)
        for first in range(0, self.blocks * each, each):
            chunks = [
                self._stored(first + i) if self.store else self.computed[first + i]
                for i in range(each)
            ]
            yield table.block(chunks, self.counts, models(self.spec))

    def close(self) -> None:
        """Wait for all processes, and let go of the store."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the result of a sweep is written")
        if self.store:
            self.store.close()

    def _stored(self, chunk: int) -> Rows:
        assert self.store is not None
        return self.store.rows(chunk, self.program.rows)


class _Meter:
    """Keeps the `Status`."""

    def __init__(self, blocks: Blocks, progress: Callable[[Status], None] | None):
        self.progress, self.spec = progress, blocks.spec
        self.program = blocks.program
        self.lanes, self.width = blocks.grid.lanes, blocks.program.lanes
        self.counts = blocks.counts
        self.lost: dict[int, int] = {}
        self.done = self.resumed = 0
        self.began: float | None = None

    def start(self) -> None:
        self.began = time.monotonic() if self.began is None else self.began

    def diverged(self, block: int, rows: Rows) -> None:
        at = rows.diverged_at[RUN][: self._size(block)]
        self.lost[block] = int(np.sum(np.isfinite(at)))

    def skip(self, block: int, part: int) -> None:
        self.done += self._steps(block, part)
        self.resumed = self.done

    def count(self, block: int, part: int) -> None:
        self.done += self._steps(block, part)
        if self.progress is None or self.began is None:
            return
        before, moments = self.spec.warmup, sum(self.counts)
        self.progress(
            Status(
                self.lanes,
                sum(self.lost.values()),
                self.done,
                self.lanes * (before + self.spec.every * moments),
                self.resumed,
                time.monotonic() - self.began,
                self.program,
            )
        )

    def _size(self, block: int) -> int:
        return min(self.width, self.lanes - block * self.width)

    def _steps(self, block: int, part: int) -> int:
        before = self.spec.warmup if part == 0 else 0
        return self._size(block) * (before + self.spec.every * self.counts[part])


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
