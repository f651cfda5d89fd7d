"""Continuous-time models of gradient descent, momentum and Adam at the edge of
stability: flows of any Optax optimizer, solved with diffrax."""

from rodjax import flows, problems, transforms
from rodjax.compare import Comparison, compare
from rodjax.curvature import (
    Eigenpair,
    edge_of_stability,
    hvp,
    sharpness,
    sharpness_ratio,
    top_eigenpair,
)
from rodjax.dynamics import Dynamics, State, dynamics
from rodjax.integrate import descend, integrate
from rodjax.plotting import plot
from rodjax.results import dataset
from rodjax.ringing import Ringing, ringing
from rodjax.stability import coordinate_thresholds, threshold
from rodjax.trajectory import Metric, Snapshot, Trajectory
from rodjax.window import Window, alternating, half_step_midpoint, midpoint, warm_up

__all__ = [
    "Comparison",
    "Dynamics",
    "Eigenpair",
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
    "hvp",
    "integrate",
    "midpoint",
    "plot",
    "problems",
    "ringing",
    "sharpness",
    "sharpness_ratio",
    "threshold",
    "top_eigenpair",
    "transforms",
    "warm_up",
]
