"""Continuous-time models of gradient descent, momentum and Adam at the edge of
stability: flows of any Optax optimizer, solved with diffrax."""

from rodjax import flows, problems, transforms
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
from rodjax.stability import coordinate_thresholds, threshold
from rodjax.trajectory import Metric, Snapshot, Trajectory
from rodjax.window import Window, half_step_midpoint, midpoint, warm_up

__all__ = [
    "Dynamics",
    "Eigenpair",
    "Metric",
    "Snapshot",
    "State",
    "Trajectory",
    "Window",
    "coordinate_thresholds",
    "descend",
    "dynamics",
    "edge_of_stability",
    "flows",
    "half_step_midpoint",
    "hvp",
    "integrate",
    "midpoint",
    "problems",
    "sharpness",
    "sharpness_ratio",
    "threshold",
    "top_eigenpair",
    "transforms",
    "warm_up",
]
