"""What divergence is counted from where a trajectory goes on from an earlier one."""

import json
from functools import partial

import cli_runner
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj

BOWL = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))


def test_what_left_in_the_warm_up_has_diverged():
    """w[t+1] = -2 w[t], whose midpoint is w[t] / 8: beyond a thousand from 13 on."""
    start = jnp.ones(1)
    window = rj.warm_up(BOWL, start, 11, lr=3.0)
    run = partial(rj.descend, BOWL, window, 3, lr=3.0)
    assert np.isinf(run().diverged_at)
    assert float(run(origin=start).diverged_at) == 13.0
    # Of the same size in numpy's arrays, and ten times as far off.
    assert np.isinf(run(origin=10 * np.ones(1)).diverged_at)


def test_so_has_a_flow():
    hill = rj.flows.stable(rj.dynamics(optax.sgd, lambda w: -0.5 * jnp.sum(w**2)))
    half = rj.integrate(hill, jnp.ones(1), 4, lr=1.0)
    rest = partial(rj.integrate, hill, half.final, 4, lr=1.0)
    assert np.isinf(rest().diverged_at)
    # e^6.9, as of a solution in one part.
    assert float(rest(origin=jnp.ones(1)).diverged_at) == 7.0


@pytest.mark.slow
def test_the_command_counts_its_warm_up(tmp_path):
    """The norm doubles every step, and those that are compared are two."""
    result = cli_runner.invoke(
        "run", "--problem", "quadratic", "--lr", 3.0, "--warmup", 40, "--steps", 2,
        "--flows", "stable", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["run"]["diverged_at"] == 40.0
    assert summary["flows"]["stable"]["diverged_at"] == 40.0
    assert "stable diverged at step 40" in result.stdout
