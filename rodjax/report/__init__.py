"""What trajectories and sweeps come to, for people and for files.

Knows: labelled data sets of runs and flows (xarray), plots of runs and of sweeps
(matplotlib), pages for a browser (plotly). Must not know: problems, optimizers by name,
the command line.
"""

from rodjax.report._dataset import dataset
from rodjax.report._plot_checkpoints import plot_checkpoints
from rodjax.report._plot_forecast import plot_forecast
from rodjax.report._plot_run import plot, plot_run
from rodjax.report._plot_sweep import (
    abscissa,
    alive,
    by_row,
    evenly,
    plot_lanes,
    plot_sweep,
    spread,
)
from rodjax.report._view import view

__all__ = [
    "abscissa",
    "alive",
    "by_row",
    "dataset",
    "evenly",
    "plot",
    "plot_checkpoints",
    "plot_forecast",
    "plot_lanes",
    "plot_run",
    "plot_sweep",
    "spread",
    "view",
]
