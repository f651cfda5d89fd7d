"""How far a flow is from the optimizer that it models."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from rodjax.solve._trajectory import Trajectory


class Comparison(NamedTuple):
    """A flow against a run, at the T saved moments; printing it gives a summary.

    Of several lanes (leading axes, from a vmap) what is printed are medians.

    - `steps`: [T], the run's steps.
    - `distance`: [T], Euclidean distance over all saved parameters between the flow's
      centre and the run's midpoint, second-order or half-step as the flow models it.
    - `run`, `flow`: name -> [T], the metrics of each: `loss` at the centre,
      `mean_loss` over the ends (predicted and measured time average), `amplitude` of
      the oscillation, and whatever else was recorded, such as `sharpness_ratio`.
    - `evaluations`, `diverged_at`: the flow's, see `Trajectory`.
    - `limit`: [T], the distance of the run from itself if it is nudged by a rounding
      error, where `compare` was given it; see `predictability`.
    """

    steps: Float[Array, "*batch T"]
    distance: Float[Array, "*batch T"]
    run: dict[str, Any]
    flow: dict[str, Any]
    evaluations: Float[Array, "*batch"]
    diverged_at: Float[Array, "*batch"]
    limit: Float[Array, "*batch T"] | None = None

    def summary(self) -> dict[str, float]:
        """The comparison in a few floats; finite entries only.

        `final_*` is the last entry before a divergence, `mean_distance` the mean over
        all, `median_sharpness_ratio` the median over the last third (NaN without the
        metric `edge_of_stability`). `final_limit` and `mean_limit` are likewise of the
        `limit`, where there is one.

        **Raises** `ValueError` for several lanes: take one of them first.
        """
        if jnp.ndim(self.diverged_at):
            raise ValueError(
                f"this comparison has lanes of shape {jnp.shape(self.diverged_at)}: "
                "take one, jax.tree.map(lambda x: x[i], comparison), or print all"
            )
        nothing = jnp.full_like(self.distance, jnp.nan)
        values = self.flow | {"distance": self.distance}
        summary = {
            name: found.reduce(values.get(found.source, nothing))
            for name, found in SUMMARIES.items()
        }
        if self.limit is not None:
            summary["final_limit"] = last_finite(self.limit)
            summary["mean_limit"] = mean_of_finite(self.limit)
        return summary | {
            "update_evaluations": float(self.evaluations),
            # As in a data set, where it is missing if there is none.
            "diverged_at": _of_finite(np.min, self.diverged_at),
        }

    def __str__(self) -> str:
        shape = jnp.shape(self.diverged_at)
        if not shape:
            return _lines(self._rows())
        # A lane's own axes are last, and every other array is of lanes alone.
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), self)
        count = int(np.prod(shape))
        lanes = [jax.tree.map(lambda x, i=i: x[i], flat)._rows() for i in range(count)]
        rows = {
            name: _of_finite(np.median, [r[name] for r in lanes]) for name in lanes[0]
        }
        lost = int(np.sum(np.isfinite(self.diverged_at)))
        head = f"medians over {count} lanes of shape {shape}, {lost} of them diverged"
        return f"{head}\n{_lines(rows)}"

    def _rows(self) -> dict[str, float]:
        """What is printed of one lane."""
        return self.summary() | {
            "final_mean_loss": last_finite(self.flow["mean_loss"]),
            "final_mean_loss (run)": last_finite(self.run["mean_loss"]),
            "final_amplitude": last_finite(self.flow["amplitude"]),
            "final_amplitude (run)": last_finite(self.run["amplitude"]),
        }


def compare(
    run: Trajectory, flow: Trajectory, *, predictability: Comparison | None = None
) -> Comparison:
    """Compare a flow with a run of the optimizer, saved at the same steps.

    Flows predict midpoints, never raw iterates: second-order midpoints, or half-step
    ones for a flow whose steps are half-integers (rods).

    **Arguments**

    - `run`: from `rodjax.descend`; or what a training loop recorded of its parameters,
      from `rodjax.training.recorded`.
    - `flow`: from `rodjax.integrate`, from the same start, with the same (linear)
      `keep`, which must keep something, and saved at the steps of the run, or at those
      and others. Leading axes from a vmap are allowed on both, where both were saved
      at the same steps.
    - `predictability`: from `rodjax.predictability`, from the same start and at the
      same steps as the run; its distance is the `limit` beside the flow's.

    **Raises** `ValueError` if the parameters do not match, the flow was not saved at a
    step of the run, or the predictability is of other steps.

    ```python
    >>> import jax.numpy as jnp, optax, rodjax as rj
    >>> sgd = rj.dynamics(optax.sgd(0.2), lambda w: 0.5 * jnp.sum(w**2))
    >>> start = rj.warm_up(sgd, jnp.ones(2), 5)
    >>> run = rj.descend(sgd, start, 10)
    >>> near = rj.compare(run, rj.integrate(rj.flows.modulated(sgd), start, 10))
    >>> far = rj.compare(run, rj.integrate(rj.flows.stable(sgd), start, 10))
    >>> bool(near.distance[-1] < 0.2 * far.distance[-1])
    True
    >>> nudged = rj.predictability(sgd, start, 10)
    >>> flow = rj.integrate(rj.flows.modulated(sgd), start, 10)
    >>> summary = rj.compare(run, flow, predictability=nudged).summary()
    >>> summary["final_limit"] < 1e-12 < summary["final_distance"]
    True

    ```
    """
    limit = None if predictability is None else limit_of(run, predictability)
    if flow.steps.shape != run.steps.shape:
        flow = _at_steps_of(run, flow)
    early = flow.steps - run.steps
    if not isinstance(early, Tracer) and not np.all((early >= 0) & (early < 1)):
        raise ValueError(
            "flow and run were saved at different steps: start both from the same "
            "parameters or the same window"
        )
    if jax.tree.map(jnp.shape, flow.params) != jax.tree.map(jnp.shape, run.params):
        raise ValueError(
            "flow and run keep different parameters: use the same keep= for both"
        )
    if not jax.tree.leaves(flow.params):
        raise ValueError("keep= has kept no parameters: there is no distance")

    distance = separation(early, flow.params, run.params, run.ends)
    return Comparison(
        run.steps,
        distance,
        run.metrics,
        flow.metrics,
        flow.evaluations,
        flow.diverged_at,
        limit,
    )


def limit_of(run: Trajectory, predictability: Comparison) -> Array:
    """Its distance. Raises `ValueError` if it is not of the steps of the run."""
    steps = predictability.steps
    traced = any(isinstance(x, Tracer) for x in (steps, run.steps))
    if steps.shape != run.steps.shape or (
        not traced and not np.array_equal(steps, run.steps)
    ):
        raise ValueError(
            "predictability is of other steps than the run: give it the same start, "
            "steps= and every="
        )
    return predictability.distance


def _at_steps_of(run: Trajectory, flow: Trajectory) -> Trajectory:
    """The moments of a flow that was saved more often than the run, or elsewhere."""
    shapes = flow.steps.shape, run.steps.shape
    if shapes[0][:-1] or shapes[1][:-1] or isinstance(flow.steps, Tracer):
        raise ValueError(
            f"flow has saved steps of shape {shapes[0]}, run of {shapes[1]}: use the "
            "same steps= and every= for both"
        )
    saved = {int(step): index for index, step in enumerate(np.floor(flow.steps))}
    wanted = np.asarray(run.steps).tolist()
    missing = [f"{step:g}" for step in wanted if step not in saved]
    if missing:
        raise ValueError(
            f"flow has no saved step {', '.join(missing)}, at which the run was saved: "
            f"it has {min(saved)} to {max(saved)}. Use the same start, and steps= and "
            "every= that meet the run's"
        )
    rows = np.array([saved[step] for step in wanted])
    timed = flow.steps, flow.params, flow.ends, flow.metrics
    steps, params, ends, metrics = jax.tree.map(lambda x: x[rows], timed)
    return replace(flow, steps=steps, params=params, ends=ends, metrics=metrics)


def separation(
    early: Float[Array, "*batch"], centre: PyTree, midpoint: PyTree, ends: PyTree
) -> Float[Array, "*batch"]:
    """Distance of a flow's centre from the run's midpoint.

    The second-order midpoint where the flow is saved `early` = 0 steps later than the
    run, the half-step one, of the run's two `ends`, where it is 1/2.
    """
    depth = jnp.ndim(early)
    squares = jax.tree.map(
        lambda c, m, e: jnp.where(
            early < 0.25,
            _squares(c - m, depth),
            _squares(c - jnp.mean(e, axis=depth), depth),
        ),
        centre,
        midpoint,
        ends,
    )
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def last_finite(values: Any) -> float:
    """The last finite entry, NaN if there is none."""
    return _of_finite(lambda x: x[-1], values)


def mean_of_finite(values: Any) -> float:
    """The mean of the finite entries, NaN if there is none."""
    return _of_finite(np.mean, values)


def median_of_last_third(values: Any) -> float:
    """The median of the finite entries in the last third, NaN if there is none."""
    return _of_finite(np.median, values[-(len(values) // 3) :])


class Summary(NamedTuple):
    """A number that stands for a whole trajectory.

    - `source`: the metric, over time, that it is of; `reduce`: how.
    - `long_name`: what a data set says of it.
    """

    source: str
    reduce: Callable[[Any], float]
    long_name: str


SUMMARIES: dict[str, Summary] = {
    "final_distance": Summary("distance", last_finite, "last finite distance"),
    "mean_distance": Summary(
        "distance", mean_of_finite, "mean distance over the steps"
    ),
    "final_loss": Summary("loss", last_finite, "last finite loss at the centre"),
    "final_sharpness_ratio": Summary(
        "sharpness_ratio", last_finite, "last finite sharpness over threshold"
    ),
    "median_sharpness_ratio": Summary(
        "sharpness_ratio",
        median_of_last_third,
        "median sharpness over threshold in the last third",
    ),
}
#: Name -> long name of what a comparison adds to the metrics of a trajectory.
COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "distance": "distance of the centre from the run's midpoint",
        "evaluations": "evaluations of the update map",
        "diverged_at": "step by which it had diverged",
    }
    | {name: found.long_name for name, found in SUMMARIES.items()}
)


def _of_finite(reduce: Any, values: Any) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(reduce(finite)) if finite.size else float("nan")


def _squares(difference: Array, depth: int) -> PyTree:
    return jnp.sum(difference**2, axis=tuple(range(depth, difference.ndim)))


def _lines(rows: Mapping[str, float]) -> str:
    return "\n".join(f"{name:24} {value:.6g}" for name, value in rows.items())
