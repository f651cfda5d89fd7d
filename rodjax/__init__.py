"""Continuous-time models of gradient descent, momentum and Adam at the edge of
stability: flows of any Optax optimizer, solved with diffrax."""

from importlib.metadata import PackageNotFoundError, version

from rodjax import (
    curvature,
    flows,
    linalg,
    optimizer,
    problems,
    report,
    solve,
    sweeps,
    training,
    transforms,
)
from rodjax.curvature import (
    hessian_eigenpairs,
    hvp,
    preconditioned_eigenpairs,
    sharpness,
    sharpness_ratio,
    third_derivative,
)
from rodjax.flows import Flow, Ringing, ringing
from rodjax.linalg import Eigenpair, Eigenpairs, top_eigenpair, top_eigenpairs
from rodjax.optimizer import (
    Dynamics,
    State,
    Window,
    alternating,
    coordinate_thresholds,
    dynamics,
    half_step_midpoint,
    midpoint,
    threshold,
    warm_up,
)
from rodjax.report import (
    dataset,
    plot,
    plot_checkpoints,
    plot_forecast,
    plot_lanes,
    plot_sweep,
    view,
)
from rodjax.solve import (
    RKC,
    Comparison,
    Metric,
    Reached,
    Snapshot,
    Trajectory,
    compare,
    descend,
    edge_of_stability,
    integrate,
    monitor,
    predictability,
    spectrum,
    stability_coefficients,
)
from rodjax.sweeps import sweep

__all__ = [
    "RKC",
    "Comparison",
    "Dynamics",
    "Eigenpair",
    "Eigenpairs",
    "Flow",
    "Metric",
    "Reached",
    "Ringing",
    "Snapshot",
    "State",
    "Trajectory",
    "Window",
    "alternating",
    "compare",
    "coordinate_thresholds",
    "curvature",
    "dataset",
    "descend",
    "dynamics",
    "edge_of_stability",
    "flows",
    "half_step_midpoint",
    "hessian_eigenpairs",
    "hvp",
    "integrate",
    "linalg",
    "midpoint",
    "monitor",
    "optimizer",
    "plot",
    "plot_checkpoints",
    "plot_forecast",
    "plot_lanes",
    "plot_sweep",
    "preconditioned_eigenpairs",
    "predictability",
    "problems",
    "report",
    "ringing",
    "sharpness",
    "sharpness_ratio",
    "solve",
    "spectrum",
    "stability_coefficients",
    "sweep",
    "sweeps",
    "third_derivative",
    "threshold",
    "top_eigenpair",
    "top_eigenpairs",
    "training",
    "transforms",
    "view",
    "warm_up",
]

try:
    __version__ = version("rodjax")
except PackageNotFoundError:
    # A checkout that is on the path and not installed.
    __version__ = "unknown"
