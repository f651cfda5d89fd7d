"""Beside a user's own training loop: watching it, its checkpoints, forecasts.

Knows: how to watch an optimizer at work (`watch`, `report`), checkpoints of runs
trained elsewhere. Must not know: grids sharded over devices, problems, plots, the
command line.
"""

from rodjax.training._checkpoints import Checkpoint, checkpoints
from rodjax.training._forecast import forecast
from rodjax.training._forecast_table import table
from rodjax.training._inspect import inspect
from rodjax.training._quantities import MEMORY, QUANTITIES
from rodjax.training._recorded import recorded
from rodjax.training._report import report
from rodjax.training._status import STATUS
from rodjax.training._watch import WatchState, watch
from rodjax.training._window import window

__all__ = [
    "MEMORY",
    "QUANTITIES",
    "STATUS",
    "Checkpoint",
    "WatchState",
    "checkpoints",
    "forecast",
    "inspect",
    "recorded",
    "report",
    "table",
    "watch",
    "window",
]
