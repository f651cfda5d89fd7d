"""What every flow promises when it is solved, by the table in contract.py."""

from functools import partial

import chex
import diffrax
import jax
import jax.numpy as jnp
import pytest
from contract import DTYPES, RATES, begun, built, slow_but
from helpers import OPTIMIZERS, START, Traced, lane, unlike

import rodjax as rj
from rodjax.flows import REGISTRY
from rodjax.solve import Reached

# A well of one leaf and the cheapest solver: neither is the point here.
WELL = Traced(lambda w: jnp.sum(w**2 + w**4))
BEGIN = START["a"]
QUICK = ("stable", "modulated", "central")
EULER = {"solver": diffrax.Euler(), "substeps": 1}


def in_the_well(name, optimizer):
    """The flow, and (start, steps, lr) -> its trajectory."""
    flow = built(name, rj.dynamics(OPTIMIZERS[optimizer], WELL))
    # Euler's unit steps let a bundle's spare rods amplify rounding by a factor of 1e5.
    way = {"substeps": 2} if name == "bundle" else EULER
    solve = lambda start, steps, lr: rj.integrate(flow, start, steps, lr=lr, **way)
    return flow, solve


@pytest.mark.parametrize(
    "name, optimizer",
    slow_but(
        lambda name, optimizer: optimizer == "sgd" and name in QUICK,
        [
            *((name, "sgd") for name in REGISTRY),
            ("stable", "adam"),
            ("rod", "adam"),
            ("modulated", "nadam"),
            ("edge", "momentum"),
            ("central", "scalar_rmsprop"),
            ("dense", "momentum"),
            ("principal top", "sgd"),
        ],
    ),
)
def test_two_halves_are_the_whole(name, optimizer):
    """Bit for bit; along one parameter, for which the central flow compiles faster."""
    flow, solve = in_the_well(name, optimizer)
    y = jax.jit(partial(begun, flow))(BEGIN[:1], RATES[0])
    at = Reached(jnp.asarray(3.0), y)
    whole = solve(at, 4, 0.01)
    first = solve(at, 2, 0.01)
    rest = solve(first.final, 2, 0.01)
    for path, rows in ((first, slice(3)), (rest, slice(2, None))):
        of = lambda path: (path.steps, path.params, path.ends, path.metrics)
        chex.assert_trees_all_equal(of(path), lane(of(whole), rows))
    chex.assert_trees_all_equal(rest.final, whole.final)
    assert float(whole.final.time) == 7.0
    assert unlike(rest.params, first.params) > 1e-6


# One optimizer per flow where a check compiles the whole solve in a batch.
solved = pytest.mark.parametrize(
    "name, optimizer",
    slow_but(
        lambda name, _: name in ("stable", "modulated"),
        [
            ("stable", "scalar_rmsprop"),
            ("rod", "adam"),
            ("bundle", "sgd"),
            ("dense", "momentum"),
            ("modulated", "rmsprop"),
            ("edge", "momentum"),
            ("central", "scalar_rmsprop"),
            ("third_order", "sgd"),
            ("principal", "sgd"),
            ("principal top", "sgd"),
            ("covariance", "sgd"),
        ],
    ),
)


@solved
def test_integrate_compiles_once_and_vmaps(name, optimizer):
    _, solve = in_the_well(name, optimizer)
    alone = [solve(BEGIN, 4, float(RATES[0]))]
    traced = WELL.count
    alone += [solve(BEGIN, 4, RATES[i]) for i in (1, 2)]
    alone[0] = solve(BEGIN, 4, RATES[0])
    assert WELL.count == traced
    chex.clear_trace_counter()
    # Chex refuses to wrap what JAX has transformed.
    every = lambda rates: jax.vmap(lambda lr: solve(BEGIN, 4, lr))(rates)  # noqa: PLW0108
    once = jax.jit(chex.assert_max_traces(every, n=1))
    batch = once(RATES)
    chex.assert_trees_all_equal(once(RATES), batch)
    once(2.0 * RATES)
    assert bool(jnp.isinf(batch.diverged_at).all())
    chex.assert_tree_all_finite((batch.params, batch.ends, batch.metrics, batch.final))
    # Within rounding, which the spare rods of a bundle amplify.
    for i, path in enumerate(alone):
        chex.assert_trees_all_close(path, lane(batch, i), rtol=1e-4, atol=1e-9)
    # The learning rate counts.
    assert unlike(alone[0].params, alone[2].params) > 1e-3


@solved
def test_no_leaked_tracers(name, optimizer):
    # Not around diffrax: within a scan its first call alone trips this check.
    flow, _ = in_the_well(name, optimizer)

    @jax.jit
    @jax.vmap
    def field(lr):
        return flow.vector_field(0.0, begun(flow, BEGIN, lr), lr)

    with jax.checking_leaks():
        chex.assert_tree_all_finite(field(RATES))


@solved
def test_float32_stays_float32(name, optimizer):
    _, solve = in_the_well(name, optimizer)
    path = jax.eval_shape(lambda w: solve(w, 2, 0.01), BEGIN.astype(DTYPES[0]))
    kept = (path.params, path.ends, path.metrics, path.final.state)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {DTYPES[0]}
