"""Every optimizer of Optax against a plain loop and the Jacobian of its own step."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from every_optimizer import (
    ORDERS,
    PROMISED,
    build,
    carried,
    orders,
    plain_loop,
    radii,
    row,
    threshold_of,
)
from optimizers import EVERY, LOSSES, START

import rodjax as rj
from rodjax.optimizer import first_edge

# One of each kind; the others are slow.
QUICK = {
    "quadratic": {"MultiSteps", "multi_transform", "two traces"},
    "net": {"masked"},
}


def slow_but(on):
    return [
        name if name in QUICK[on] else pytest.param(name, marks=pytest.mark.slow)
        for name in EVERY
    ]


every = pytest.mark.parametrize("name", slow_but("quadratic"))
# Its preconditioner, the deviation from the mean gradient, nearly vanishes in between.
LEAVES = {"acprop", "adopt"}
# Who loses stability first to an oscillation of another period than two.
OTHER_PERIODS = {"two traces": 6.0}
PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def check_loop(name, on):
    """A run, which is the Optax loop to rounding."""
    _, dynamics = build(name, on)
    run = rj.descend(dynamics, LOSSES[on][1], 9)
    assert np.isinf(run.diverged_at)
    chex.assert_tree_all_finite((run.params, run.ends, run.metrics))
    # All of them; and Optax reads integer counts in single precision.
    iterates = jax.tree.map(lambda x: np.concatenate([x[:, 0], x[-1:, 1]]), run.ends)
    loop = plain_loop(name, 10, on)
    chex.assert_trees_all_close(iterates, loop, rtol=1e-7, atol=1e-8)
    return run


def check_flows(name, on, run):
    """They run, or say why not, or warn that they will not do for long."""
    _, dynamics = build(name, on)
    for build_flow in (rj.flows.stable, rj.flows.modulated):
        flow = build_flow(dynamics)
        warned = name in OTHER_PERIODS and build_flow is rj.flows.modulated
        with pytest.warns(rj.flows.PeriodWarning) if warned else nullcontext():
            why = carried(flow, LOSSES[on][1])
        if why is not None:
            assert why.startswith("no flow can carry this optimizer: ")
            continue
        with warnings.catch_warnings():
            if warned:
                warnings.simplefilter("ignore", rj.flows.PeriodWarning)
            path = rj.integrate(flow, LOSSES[on][1], 9)
        if name in LEAVES and np.isfinite(path.diverged_at):
            continue
        assert np.isinf(path.diverged_at)
        chex.assert_tree_all_finite((path.params, path.metrics, path.final))
        size = float(optax.tree.norm(LOSSES[on][1]))
        assert float(rj.compare(run, path).distance[-1]) < 0.31 * size


@every
def test_a_run_is_the_optax_loop_and_flows_run_or_say_why_not(name):
    check_flows(name, "quadratic", check_loop(name, "quadratic"))


@pytest.mark.parametrize("name", slow_but("net"))
def test_likewise_on_a_small_net(name):
    check_flows(name, "net", check_loop(name, "net"))


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
        # Which flows know without any of this, if at all.
        angle = dynamics.angle(START)
        truth = first_edge(dynamics, START).angle
        assert angle is None or np.isclose(angle, truth, rtol=1e-5)
        assert (name in OTHER_PERIODS) == (float(truth) < 3.14)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in EVERY]
)
def test_orders_in_the_learning_rate(name):
    """Below the threshold; with the reason where they are not as promised."""
    _, dynamics = build(name)
    if carried(rj.flows.stable(dynamics)) is not None:
        pytest.skip("no flow carries it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rj.flows.PeriodWarning)
        found = orders(name)
    near = lambda x, y: x == y if isinstance(y, str | None) else abs(x - y) < 0.25
    if isinstance(ORDERS[name], str):
        # Else the reason is none.
        assert not all(map(near, found.values(), PROMISED)), found
    else:
        assert all(map(near, found.values(), ORDERS[name])), found


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
