"""The update map of an Optax optimizer, and what follows from it alone.

Knows: how a step of any Optax optimizer is taken and its state split (`dynamics`,
`State`), windows of consecutive states of a run (`Window`), when the linearized map
becomes unstable (`threshold`), and when two optimizers are the same (`compiled`). Must
not know: derivatives of the loss beyond its gradient, flows, solvers, files.
"""

from rodjax.optimizer._convolutions import for_loops
from rodjax.optimizer._dynamics import Dynamics, Loss, dynamics
from rodjax.optimizer._given import fitted
from rodjax.optimizer._linear import LinearMap, linearize
from rodjax.optimizer._precision import narrow_products, precise
from rodjax.optimizer._ring import Ring, push, ring, unrolled
from rodjax.optimizer._same import Same, compiled, fingerprint
from rodjax.optimizer._sharding import check_mesh
from rodjax.optimizer._split import Kind, OptimizerFactory
from rodjax.optimizer._stability import (
    Edges,
    coordinate_edges,
    coordinate_thresholds,
    inverse_preconditioner,
    learning_rate,
)
from rodjax.optimizer._state import (
    State,
    has_momentum,
    merge,
    split_like,
    widest,
)
from rodjax.optimizer._threshold import (
    NOT_APART,
    alternating_multiplier,
    first_edge,
    threshold,
    unit_preconditioner,
)
from rodjax.optimizer._warm_up import opening, warm_up
from rodjax.optimizer._window import (
    REACH,
    Window,
    alternating,
    half_step_midpoint,
    midpoint,
)

__all__ = [
    "NOT_APART",
    "REACH",
    "Dynamics",
    "Edges",
    "Kind",
    "LinearMap",
    "Loss",
    "OptimizerFactory",
    "Ring",
    "Same",
    "State",
    "Window",
    "alternating",
    "alternating_multiplier",
    "check_mesh",
    "compiled",
    "coordinate_edges",
    "coordinate_thresholds",
    "dynamics",
    "fingerprint",
    "first_edge",
    "fitted",
    "for_loops",
    "half_step_midpoint",
    "has_momentum",
    "inverse_preconditioner",
    "learning_rate",
    "linearize",
    "merge",
    "midpoint",
    "narrow_products",
    "opening",
    "precise",
    "push",
    "ring",
    "split_like",
    "threshold",
    "unit_preconditioner",
    "unrolled",
    "warm_up",
    "widest",
]
