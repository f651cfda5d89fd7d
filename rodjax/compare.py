"""How far a flow is from the optimizer that it models."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from rodjax.trajectory import Trajectory


class Comparison(NamedTuple):
    """A flow against a run, at the T saved moments; printing it gives a summary.

    - `steps`: [T], the run's steps.
    - `distance`: [T], Euclidean distance over all saved parameters between the flow's
      centre and the run's midpoint, second-order or half-step as the flow models it.
    - `flow`, `run`: name -> [T], the metrics of each: `loss` at the centre,
      `mean_loss` over the ends (predicted and measured time average), `amplitude` of
      the oscillation, and whatever else was recorded, such as `sharpness_ratio`.
    - `evaluations`, `diverged_at`: the flow's, see `Trajectory`.
    """

    steps: Float[Array, "*batch T"]
    distance: Float[Array, "*batch T"]
    flow: dict[str, Float[Array, "*batch T"]]
    run: dict[str, Float[Array, "*batch T"]]
    evaluations: Float[Array, "*batch"]
    diverged_at: Float[Array, "*batch"]

    def summary(self) -> dict[str, float]:
        """The comparison in a few floats; finite entries only, of one lane.

        `final_*` is the last entry before a divergence, `mean_distance` the mean over
        all, `median_sharpness_ratio` the median over the last third (NaN without the
        metric `edge_of_stability`).
        """
        ratio = self.flow.get("sharpness_ratio", jnp.full_like(self.distance, jnp.nan))
        return {
            "final_distance": last_finite(self.distance),
            "mean_distance": _of_finite(np.mean, self.distance),
            "final_loss": last_finite(self.flow["loss"]),
            "final_sharpness_ratio": last_finite(ratio),
            "median_sharpness_ratio": _of_finite(
                np.median, ratio[-(len(ratio) // 3) :]
            ),
            "update_evaluations": float(self.evaluations),
            "diverged_at": float(self.diverged_at),
        }

    def __str__(self) -> str:
        rows = self.summary() | {
            "final_mean_loss": last_finite(self.flow["mean_loss"]),
            "final_mean_loss (run)": last_finite(self.run["mean_loss"]),
            "final_amplitude": last_finite(self.flow["amplitude"]),
            "final_amplitude (run)": last_finite(self.run["amplitude"]),
        }
        return "\n".join(f"{name:24} {value:.6g}" for name, value in rows.items())


def compare(flow: Trajectory, run: Trajectory) -> Comparison:
    """Compare a flow with a run of the optimizer, saved at the same steps.

    Flows predict midpoints, never raw iterates: second-order midpoints, or half-step
    ones for a flow whose steps are half-integers (rods).

    **Arguments**

    - `flow`: from `rodjax.integrate`.
    - `run`: from `rodjax.descend`, from the same start, for as many steps, with the
      same `every` and the same (linear) `project`, which must keep something. Leading
      axes from a vmap are allowed on both.

    **Raises** `ValueError` if the saved steps or parameters do not match.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> start = rj.warm_up(sgd, jnp.ones(2), 5)
    >>> run = rj.descend(sgd, start, 10)
    >>> near = rj.compare(rj.integrate(rj.flows.modulated(sgd), start, 10), run)
    >>> far = rj.compare(rj.integrate(rj.flows.stable(sgd), start, 10), run)
    >>> bool(near.distance[-1] < 0.2 * far.distance[-1])
    True

    ```
    """
    if flow.steps.shape != run.steps.shape:
        raise ValueError(
            f"flow has saved steps of shape {flow.steps.shape}, run of "
            f"{run.steps.shape}: use the same steps= and every= for both"
        )
    early = flow.steps - run.steps
    if not isinstance(early, Tracer) and not np.all((early >= 0) & (early < 1)):
        raise ValueError(
            "flow and run were saved at different steps: start both from the same "
            "parameters or the same window"
        )
    if jax.tree.map(jnp.shape, flow.params) != jax.tree.map(jnp.shape, run.params):
        raise ValueError(
            "flow and run keep different parameters: use the same project= for both"
        )
    if not jax.tree.leaves(flow.params):
        raise ValueError("project= has kept no parameters: there is no distance")

    depth = run.steps.ndim
    half_step = jax.tree.map(lambda e: jnp.mean(e, axis=depth), run.ends)
    squares = jax.tree.map(
        lambda c, second, half: jnp.where(
            early < 0.25, _squares(c - second, depth), _squares(c - half, depth)
        ),
        flow.params,
        run.params,
        half_step,
    )
    distance = jnp.sqrt(sum(jax.tree.leaves(squares)))
    return Comparison(
        run.steps,
        distance,
        flow.metrics,
        run.metrics,
        flow.evaluations,
        flow.diverged_at,
    )


def last_finite(values: Array) -> float:
    """The last finite entry, NaN if there is none."""
    return _of_finite(lambda x: x[-1], values)


def _of_finite(reduce: Any, values: Array) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(reduce(finite)) if finite.size else float("nan")


def _squares(difference: Array, depth: int) -> PyTree:
    return jnp.sum(difference**2, axis=tuple(range(depth, difference.ndim)))
