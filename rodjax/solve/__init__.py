"""From a flow or an optimizer to a Trajectory.

Knows: the loop that follows either from one saved moment to the next (`integrate`,
`descend`), what can be recorded on the way (`Metric`), and how far a flow is from a run
(`compare`). Must not know: grids, devices, files, plots.
"""

from rodjax.solve._compare import (
    COMPARED,
    SUMMARIES,
    Comparison,
    compare,
    last_finite,
    separation,
)
from rodjax.solve._course import Course, begun, descent, solution
from rodjax.solve._heun import Heun
from rodjax.solve._integrate import (
    LIMIT,
    descend,
    everything,
    integrate,
    saved_moments,
)
from rodjax.solve._labels import (
    FLOW,
    NUDGED,
    RUN,
    STEP,
    attributes,
    check_flows,
    stacked,
    step_coordinate,
)
from rodjax.solve._method import Method, solving
from rodjax.solve._metrics import (
    LOSSES,
    edge_of_stability,
    losses,
    monitor,
    spectrum,
    stability_coefficients,
)
from rodjax.solve._predictability import (
    DRAWS,
    itself,
    look_at_all,
    lost_at,
    nudged_windows,
    predictability,
)
from rodjax.solve._record import Place, begin, enter, leave, measure_each, proceed
from rodjax.solve._rkc import RKC
from rodjax.solve._trajectory import (
    Metric,
    Progress,
    Reached,
    Snapshot,
    Trajectory,
)

__all__ = [
    "COMPARED",
    "DRAWS",
    "FLOW",
    "LIMIT",
    "LOSSES",
    "NUDGED",
    "RKC",
    "RUN",
    "STEP",
    "SUMMARIES",
    "Comparison",
    "Course",
    "Heun",
    "Method",
    "Metric",
    "Place",
    "Progress",
    "Reached",
    "Snapshot",
    "Trajectory",
    "attributes",
    "begin",
    "begun",
    "check_flows",
    "compare",
    "descend",
    "descent",
    "edge_of_stability",
    "enter",
    "everything",
    "integrate",
    "itself",
    "last_finite",
    "leave",
    "look_at_all",
    "losses",
    "lost_at",
    "measure_each",
    "monitor",
    "nudged_windows",
    "predictability",
    "proceed",
    "saved_moments",
    "separation",
    "solution",
    "solving",
    "spectrum",
    "stability_coefficients",
    "stacked",
    "step_coordinate",
]
