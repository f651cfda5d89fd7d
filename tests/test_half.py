"""Half a precision: of the parameters, and of the products within the loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import REGISTRY, check_seen

HALVES = ["float16", "bfloat16"]
BUILDS = {name: record.build for name, record in REGISTRY.items()}
# Bundles and directions in as few parameters as there are here.
BUILDS["principal"] = partial(rj.flows.principal, rank=1)
X = np.linspace(-1.0, 1.0, 6)[:, None] ** np.arange(3)
Y = np.sin(3 * X[:, :1])


def loss(w, compute="float32"):
    cast = lambda x: jnp.asarray(x, compute)
    hidden = jnp.tanh(cast(X) @ cast(w["in"]))
    error = jnp.asarray(hidden @ cast(w["out"]), "float32") - Y.astype("float32")
    return jnp.mean(error**2)


def start(dtype):
    draws = np.random.default_rng(0)
    w = {"in": draws.normal(size=(3, 4)), "out": draws.normal(size=(4, 1))}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), w)


QUICK = ("stable", "modulated")
FLOWS = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK))
    for name in BUILDS
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_of_half_precision_parameters_is_that_of_single(name, dtype):
    """Which its state is in: what it follows would vanish among their roundings."""
    flow = BUILDS[name](rj.dynamics(optax.sgd(0.25), loss))
    single = jax.tree.map(lambda x: x.astype("float32"), start(dtype))
    half, other = (rj.integrate(flow, w, 6, every=2) for w in (start(dtype), single))
    for x, y in zip(*map(jax.tree.leaves, (half, other)), strict=True):
        assert x.dtype == y.dtype
        # The rod begins with a step of the run, which is rounded.
        near = 8 * float(jnp.finfo(dtype).eps) if name == "rod" else 1e-5
        np.testing.assert_allclose(x, y, rtol=10 * near, atol=near)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_run_in_half_precision_is_its_own_and_flows_go_on_from_it(dtype):
    """Iterates are those of Optax; between two of them there is single precision."""
    optimizer = optax.sgd(0.25, momentum=0.5)
    run = rj.descend(rj.dynamics(optimizer, loss), start(dtype), 20)
    w, state = start(dtype), optimizer.init(start(dtype))
    for t in range(20):
        for name, ends in run.ends.items():
            assert ends.dtype == dtype
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                np.float32(ends[t, 0]), np.float32(w[name]), rtol=4 * eps, atol=4 * eps
            )
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
    assert all(x.dtype == "float32" for x in jax.tree.leaves(run.params))
    flow = rj.flows.modulated(rj.dynamics(optimizer, loss))
    path = rj.integrate(flow, run.final, 20)
    assert np.isinf(path.diverged_at)
    ahead = rj.descend(rj.dynamics(optimizer, loss), run.final, 20)
    # No further apart than the run is from itself by its roundings.
    size = float(optax.tree.norm(start(dtype)))
    assert rj.compare(ahead, path).distance.max() < 40 * eps * size


@pytest.mark.parametrize("compute", HALVES)
def test_products_in_half_precision_are_for_flows_without_an_oscillation(compute):
    coarse = rj.dynamics(optax.sgd(0.25), partial(loss, compute=compute))
    fine = rj.dynamics(optax.sgd(0.25), loss)
    paths = [
        rj.integrate(rj.flows.stable(d), start("float32"), 10) for d in (coarse, fine)
    ]
    losses = [path.metrics["loss"] for path in paths]
    eps = float(jnp.finfo(compute).eps)
    np.testing.assert_allclose(*losses, rtol=4 * eps, atol=eps)
    with pytest.raises(ValueError, match=f"multiplies in {compute}, in which it is"):
        check_seen(coarse, start("float32"), "the flow")
    check_seen(fine, start("float32"), "the flow")
    # Where the parameters alone are narrow, the flow's are not.
    check_seen(fine, jax.tree.map(lambda x: x.astype("float32"), start(compute)), "it")
