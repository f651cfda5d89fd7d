"""Parameters over several devices: watched as on one, and where they are."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rodjax as rj

DEVICES = 4
SPECS = {"a": PartitionSpec(None, "x"), "b": PartitionSpec("x")}


@pytest.mark.slow
def test_a_report_is_that_of_one_device_and_nothing_is_gathered():
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    # Twice as many threads as devices, which else wait for each other.
    more = {"XLA_FLAGS": flags, "NPROC": str(2 * DEVICES), "JAX_ENABLE_X64": "1"}
    subprocess.run([sys.executable, __file__], env=os.environ | more, check=True)


def main():
    assert jax.device_count() == DEVICES
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params, x = {"a": 0.3 * draw(0, 8, 16), "b": draw(1, 16)}, draw(2, 32, 8)
    loss = lambda w: jnp.mean(jnp.tanh(x @ w["a"] + w["b"]) ** 2)
    watched = rj.training.watch(optax.adam(0.01), every=2, by=lambda path: path[0].key)

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = watched.update(grad, state, w, value=value, value_fn=loss)
        return optax.apply_updates(w, updates), state

    def run(w):
        state = watched.init(w)
        for _ in range(5):
            w, state = step(w, state)
        return w, state

    _, expected = run(params)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    spread = jax.tree.map(jax.device_put, params, shardings)
    end, state = run(spread)
    found, expected = map(rj.training.report, (state, expected))
    assert found.keys() == expected.keys() and int(found["probed_at"]) == 4
    for name, value in expected.items():
        # The gain of a step is a small difference of losses.
        np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)
    trees = (end, state.inner[0].mu, state.inner[0].nu, *state.directions.values())
    assert len(trees) == 5
    for tree in trees:
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name
    program = step.lower(spread, watched.init(spread)).compile().as_text()
    assert re.search(r"all-reduce(-start)?\(", program)
    assert not re.search(r"all-gather(-start)?\(", program)


if __name__ == "__main__":
    main()
