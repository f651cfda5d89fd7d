"""The modulated flow from step 0, where second moments are still zero."""

import jax
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax import transforms

STEPS = 20
# Learning rates at which each moves well within its first steps.
RATES = {
    "adam": (optax.adam, 0.025),
    "rmsprop": (optax.rmsprop, 8e-4),
    "nadam": (optax.nadam, 6e-3),
    "adabelief": (optax.adabelief, 0.01),
    "yogi": (optax.yogi, 0.02),
    "amsgrad": (optax.amsgrad, 0.02),
    "scalar_adam": (transforms.scalar_adam, 0.1),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "name",
    [n if n == "adam" else pytest.param(n, marks=pytest.mark.slow) for n in RATES],
)
def test_starts_as_well_as_the_stable_flow(name, dtype):
    """Adam's parameters once jumped by ten times what the run moved."""
    factory, lr = RATES[name]
    problem = rj.problems.mlp(rj.problems.digits(100, dtype=dtype))
    params = jax.tree.map(lambda x: x.astype(dtype), problem.params)
    dynamics = rj.dynamics(factory, problem.loss)
    run = rj.descend(dynamics, params, STEPS, lr=lr)
    distance = {}
    flows = {
        "stable": rj.flows.stable(dynamics),
        2: rj.flows.modulated(dynamics),
        3: rj.flows.modulated(dynamics, degree=3),
    }
    for label, flow in flows.items():
        path = rj.integrate(flow, params, STEPS, lr=lr)
        distance[label] = np.asarray(rj.compare(run, path).distance)
    # The first step has a length of its own, as long as there is no second moment.
    first = optax.tree.norm(jax.tree.map(lambda x: x[1, 0] - x[0, 0], run.ends))
    for order in (2, 3):
        assert distance[order][1] < 0.5 * first
        assert distance[order].mean() < 0.75 * distance["stable"].mean()
