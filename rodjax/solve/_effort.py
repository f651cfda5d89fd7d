"""What a solve asks of a flow: evaluations, and steps by the flow's own norm."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rodjax.solve._rkc import RKC

# What a controller has that was not told of another.
USUAL = diffrax.PIDController(rtol=1.0, atol=1.0).norm


def spent(solver: diffrax.AbstractSolver, solved: Any) -> Array:
    """Evaluations of the field in a `diffrax.Solution`; NaN if they are not known."""
    if isinstance(solver, RKC):
        return solved.controller_state[1] + 1
    per_step, per_solve = _stages(solver)
    return solved.stats["num_steps"] * per_step + per_solve


def controlled(
    controller: diffrax.AbstractStepSizeController,
    solver: diffrax.AbstractSolver,
    norm: Callable[[PyTree], Array],
) -> diffrax.AbstractStepSizeController:
    """The controller by that norm, unless it has its own, and counting if it must."""
    if getattr(controller, "norm", None) is USUAL:
        controller = dataclasses.replace(controller, norm=norm)
    return _Counting(controller, solver) if isinstance(solver, RKC) else controller


class _Counting(diffrax.AbstractStepSizeController):
    """A controller that counts the stages of every step, refused ones included."""

    controller: diffrax.AbstractStepSizeController
    solver: RKC

    def wrap(self, direction: Any) -> "_Counting":
        return _Counting(self.controller.wrap(direction), self.solver)

    def init(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Any,
        dt0: Any,
        args: Any,
        func: Any,
        error_order: Any,
    ) -> tuple[Any, Any]:
        given = terms, t0, t1, y0, dt0, args, func, error_order
        t1, state = self.controller.init(*given)
        return t1, (state, jnp.zeros((), jnp.int32))

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> Any:
        state, count = controller_state
        given = t0, t1, y0, y1_candidate, args, y_error, error_order
        *found, state, result = self.controller.adapt_step_size(*given, state)
        count += self.solver.calls(jnp.asarray(t1 - t0))
        return *found, (state, count), result


def _stages(solver: diffrax.AbstractSolver) -> tuple[float, float]:
    """Vector-field evaluations of an explicit solver: per step, and once per solve."""
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    tableau = getattr(solver, "tableau", None)
    explicit = isinstance(solver, diffrax.AbstractERK)
    if explicit and isinstance(tableau, diffrax.ButcherTableau):
        reused = int(tableau.fsal)
        return tableau.num_stages - reused, reused
    return float("nan"), 0
