"""Runs and flows on every point of a named grid, as one program.

Knows: grids, devices, what fits into their memory, chunks and their checkpoints, and
the labelled result. Must not know: plots, problems, the command line.
"""

from rodjax.sweeps._blocks import Status
from rodjax.sweeps._grid import SEED, make_grid
from rodjax.sweeps._program import Program, cores
from rodjax.sweeps._store import forget, settings_in
from rodjax.sweeps._sweep import sweep

__all__ = [
    "SEED",
    "Program",
    "Status",
    "cores",
    "forget",
    "make_grid",
    "settings_in",
    "sweep",
]
