"""How a flow is solved, and what cannot solve one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax

from rodjax.flows import Flow
from rodjax.solve import _stretch
from rodjax.solve._heun import Heun
from rodjax.solve._rkc import RKC

ADJOINTS = (
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.ForwardMode,
)
# The kind of a solver's own loop that each can differentiate.
LOOPS = dict(zip(ADJOINTS, ("checkpointed", "bounded", "lax"), strict=True))


# Solver steps to an optimizer step, of a solver that is given without.
USUAL = 4
DEFAULT = "default"


class Method(NamedTuple):
    """How flows are solved: `substeps` solver steps to an optimizer step.

    `None` for the solver or the substeps is each flow's own, which `of` fills in.
    """

    solver: diffrax.AbstractSolver | None
    substeps: float | None
    stepsize_controller: diffrax.AbstractStepSizeController
    adjoint: diffrax.AbstractAdjoint

    def of(self, flow: Flow) -> "Solving":
        """How that one is solved."""
        own = flow.euler_field is not None and self.constant()
        solver = self.solver
        if solver is None:
            solver = diffrax.Euler() if own else Heun()
            substeps = self.substeps or flow.substeps
            if own and substeps <= 1:
                raise ValueError(
                    f"substeps={substeps:g}: this flow is solved by Euler's method, of "
                    "which a step of one optimizer step is the optimizer itself: give "
                    "2 or more, or another solver"
                )
        else:
            substeps = self.substeps or USUAL
            own = own and type(solver) is diffrax.Euler and substeps > 1
        if flow.euler_field is None or not own:
            return Solving(self, flow.vector_field, solver, substeps)
        return Solving(self, flow.euler_field(1 / substeps), solver, substeps)

    def settings(self) -> dict[str, Any]:
        """What a labelled result says of it."""
        solver = DEFAULT if self.solver is None else type(self.solver).__name__
        substeps = DEFAULT if self.substeps is None else self.substeps
        return {"substeps": substeps, "solver": solver}

    def constant(self) -> bool:
        """Whether all steps are of one size."""
        return isinstance(self.stepsize_controller, diffrax.ConstantStepSize)


class Solving(NamedTuple):
    """How one flow is solved, and its field for that."""

    method: Method
    field: Callable[..., Any]
    solver: diffrax.AbstractSolver
    substeps: float

    def together(self, every: int, moments: int) -> int:
        """Moments that are solved for at a time: one where a step ends at every one.

        A solution goes on from there bit for bit; else the solver starts afresh at the
        end of a stretch only, and moments within are interpolated.
        """
        if self.method.constant() and 1 / self.substeps <= every:
            return 1
        return _stretch.moments_together(every, moments)


def solving(
    solver: diffrax.AbstractSolver | None = None,
    substeps: float | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Method:
    """Constant steps and the checkpointed adjoint where `None`.

    **Raises** `ValueError` or `TypeError`, naming the argument, for what cannot solve a
    flow.
    """
    if substeps is not None and not substeps > 0:
        raise ValueError(f"substeps must be positive, got {substeps}")
    # Heun's own in the form that takes less memory.
    if type(solver) is diffrax.Heun:
        solver = Heun()
    if solver is not None and not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"solver must be a diffrax solver, such as Heun(); got {solver}"
        )
    if solver is not None and solver.term_structure not in (
        diffrax.AbstractTerm,
        diffrax.ODETerm,
    ):
        raise ValueError(
            f"solver {type(solver).__name__} is for vector fields in several parts or "
            "with noise, and a flow is one: give a solver of ODEs, such as Heun(), "
            "Tsit5() or Kvaerno5()"
        )
    if stepsize_controller is None:
        stepsize_controller = diffrax.ConstantStepSize()
    tolerance = getattr(getattr(solver, "root_finder", None), "rtol", 0.0)
    constant = isinstance(stepsize_controller, diffrax.ConstantStepSize)
    if constant and not isinstance(tolerance, int | float):
        raise ValueError(
            f"solver {type(solver).__name__} is implicit, and constant steps do not "
            "say how accurately to solve for one: give stepsize_controller=diffrax."
            "PIDController(rtol=1e-6, atol=1e-9), or a root finder with tolerances"
        )
    adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
    if not isinstance(adjoint, ADJOINTS):
        raise ValueError(
            f"adjoint {type(adjoint).__name__} gives wrong derivatives of a flow, "
            "which cannot be solved backwards: give RecursiveCheckpointAdjoint(), "
            "DirectAdjoint() or, for jax.jvp and jax.jacfwd, ForwardMode()"
        )
    if isinstance(solver, RKC):
        solver = dataclasses.replace(solver, scan_kind=LOOPS[type(adjoint)])
    return Method(solver, substeps, stepsize_controller, adjoint)
