"""Sweeps: runs and flows on every point of a named grid, as one program."""

from rodjax.sweeps.blocks import Status
from rodjax.sweeps.plots import plot_lanes, plot_sweep
from rodjax.sweeps.sweep import sweep

__all__ = ["Status", "plot_lanes", "plot_sweep", "sweep"]
