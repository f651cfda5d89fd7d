"""Every optimizer of Optax against a plain loop and the Jacobian of its own step."""

from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from every_optimizer import (
    EVERY,
    START,
    build,
    carried,
    plain_loop,
    radii,
    row,
    threshold_of,
)

import rodjax as rj

# One of each kind; the others are slow.
QUICK = {"MultiSteps", "multi_transform", "two traces"}
every = pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY],
)
# Its preconditioner, the deviation from the mean gradient, nearly vanishes in between.
LEAVES = {"acprop", "adopt"}
PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


@every
def test_a_run_is_the_optax_loop(name):
    _, dynamics = build(name)
    run = rj.descend(dynamics, START, 9)
    assert np.isinf(run.diverged_at)
    chex.assert_tree_all_finite((run.params, run.ends, run.metrics))
    loop = plain_loop(name, 10)
    for key, ends in run.ends.items():
        iterates = np.concatenate([ends[:, 0], ends[-1:, 1]])
        # Optax reads integer counts in single precision.
        np.testing.assert_allclose(iterates, loop[key], rtol=1e-7, atol=1e-8)


@every
def test_the_threshold_is_where_its_own_step_becomes_unstable(name):
    _, dynamics = build(name)
    edge = threshold_of(dynamics)
    if isinstance(edge, str):
        assert "threshold" in edge
    elif edge == np.inf:
        # The sign of the gradient is all that they see.
        assert name in ("lion", "sign_sgd", "signum")
    else:
        ratios = np.concatenate([np.geomspace(1e-4, 0.999, 30), [1.001]])
        spectral = radii(name, edge * ratios)
        assert spectral[:-1].max() < 1 + 1e-9 < spectral[-1]


@every
def test_flows_run_or_say_why_not(name):
    _, dynamics = build(name)
    run = rj.descend(dynamics, START, 9)
    for flow in (rj.flows.stable(dynamics), rj.flows.modulated(dynamics)):
        why = carried(flow)
        if why is not None:
            assert why.startswith("no flow can carry this optimizer: ")
            continue
        path = rj.integrate(flow, START, 9)
        if name in LEAVES and np.isfinite(path.diverged_at):
            continue
        assert np.isinf(path.diverged_at)
        chex.assert_tree_all_finite((path.params, path.metrics, path.final))
        assert float(rj.compare(run, path).distance[-1]) < 0.4


@every
def test_the_documentation_says_so(name):
    lines = PAGE.read_text().splitlines()
    assert row(name) in lines, (
        f"{PAGE} is not up to date: python tests/every_optimizer.py prints its table"
    )


def test_names_are_those_of_the_state():
    """Momentum and second moments of a part of the parameters are found as such."""
    _, dynamics = build("multi_transform")
    state = dynamics.init(START)
    sizes = [len(jax.tree.leaves(part)) for part in state]
    # Of a heavy ball on one leaf and of Adam on the other.
    assert sizes == [4, 1, 1, 0]
