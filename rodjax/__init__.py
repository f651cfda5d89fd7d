"""Continuous-time models of gradient descent, momentum and Adam at the edge of
stability: flows of any Optax optimizer, solved with diffrax."""

from rodjax import flows, problems, transforms
from rodjax.coefficients import stability_coefficients
from rodjax.compare import Comparison, compare
from rodjax.curvature import (
    edge_of_stability,
    hessian_eigenpairs,
    hvp,
    preconditioned_eigenpairs,
    sharpness,
    sharpness_ratio,
    spectrum,
    third_derivative,
)
from rodjax.dynamics import Dynamics, State, dynamics
from rodjax.eigen import Eigenpair, Eigenpairs, top_eigenpair, top_eigenpairs
from rodjax.integrate import descend, integrate
from rodjax.plotting import plot
from rodjax.results import dataset
from rodjax.ringing import Ringing, ringing
from rodjax.stability import coordinate_thresholds, threshold
from rodjax.sweeps import plot_lanes, plot_sweep, sweep
from rodjax.trajectory import Metric, Snapshot, Trajectory, monitor
from rodjax.window import Window, alternating, half_step_midpoint, midpoint, warm_up

__all__ = [
    "Comparison",
    "Dynamics",
    "Eigenpair",
    "Eigenpairs",
    "Metric",
    "Ringing",
    "Snapshot",
    "State",
    "Trajectory",
    "Window",
    "alternating",
    "compare",
    "coordinate_thresholds",
    "dataset",
    "descend",
    "dynamics",
    "edge_of_stability",
    "flows",
    "half_step_midpoint",
    "hessian_eigenpairs",
    "hvp",
    "integrate",
    "midpoint",
    "monitor",
    "plot",
    "plot_lanes",
    "plot_sweep",
    "preconditioned_eigenpairs",
    "problems",
    "ringing",
    "sharpness",
    "sharpness_ratio",
    "spectrum",
    "stability_coefficients",
    "sweep",
    "third_derivative",
    "threshold",
    "top_eigenpair",
    "top_eigenpairs",
    "transforms",
    "warm_up",
]
