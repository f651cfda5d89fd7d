"""What every flow promises of itself and its field, by the table in contract.py."""

import inspect
import math
from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    DTYPES,
    PAIRS,
    RATES,
    ROWS,
    begun,
    built,
    flow_of,
    shapes_of,
    slow_but,
    start,
    state_of,
    table,
)
from helpers import OPTIMIZERS, START, Counted, coupled, heun, lane, unlike

import rodjax as rj
from rodjax.flows import REGISTRY

# --- the registry ---------------------------------------------------------------------


def test_every_flow_has_a_row():
    missing = sorted(set(REGISTRY) - set(ROWS))
    assert not missing, (
        f"no row of expected properties for {missing}: add one to ROWS in contract.py, "
        "with the class of the flow's state, the evaluations and products in one call "
        "of its vector field, its offset, and whether it is exact on quadratics"
    )
    assert set(ROWS) == set(REGISTRY), "a row for a flow that the registry has not"


@pytest.mark.parametrize("name", REGISTRY)
def test_record_and_row_are_what_the_flow_is(name):
    record, row, flow = REGISTRY[name], ROWS[name], flow_of(name, "sgd")
    assert (record.name, record.build.__name__) == (name, name)
    assert getattr(rj.flows, name) is record.build
    options = inspect.signature(record.build).parameters
    assert (record.floor, record.rank) == ("floor" in options, "rank" in options)
    assert dict(record.reports) == dict(flow.reports)
    assert (flow.evaluations, flow.offset) == (row.evaluations, row.offset)
    np.testing.assert_equal(flow.products, row.products)
    y, _, (_, report) = shapes_of(name, "sgd", DTYPES[0], True)
    assert type(y) is row.state
    # To be found where the flow is, or at the top.
    home = rj if row.state is rj.State else rj.flows
    assert getattr(home, row.state.__name__) is row.state
    assert set(report) == set(flow.reports)
    assert all(flow.reports.values())


@pytest.mark.parametrize("name", REGISTRY)
def test_exact_on_quadratics_or_not(name):
    """Exact where the centre's rate is log(1 - eta l)."""
    flow = built(name, rj.dynamics(optax.sgd(1.0), lambda w: 0.25 * jnp.sum(w**2)))

    @jax.jit
    def rate(w):
        y = begun(flow, w, None)
        return flow.centre(flow.vector_field(0.0, y, None)).params / w

    error = abs(float(rate(jnp.ones(1))[0]) / math.log(1.0 - 0.5) - 1.0)
    assert error < 1e-12 if ROWS[name].exact else error > 1e-3


# --- the field ------------------------------------------------------------------------


@table
def test_field_is_like_the_state_in_both_precisions(name, optimizer):
    # One precision from scratch, the other from a window.
    for dtype, scratch in zip(DTYPES, (True, False), strict=True):
        y, dy, (ends, report) = shapes_of(name, optimizer, dtype, scratch)
        chex.assert_trees_all_equal_shapes_and_dtypes(y, dy)
        assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {dtype}
        centre = jax.eval_shape(flow_of(name, optimizer).centre, y).params
        chex.assert_trees_all_equal_shapes_and_dtypes(centre, start(dtype))
        assert {value.dtype for value in report.values()} <= {dtype}
        each = jax.eval_shape(partial(lane, index=0), ends)
        chex.assert_trees_all_equal_shapes_and_dtypes(each, start(dtype))


@table
def test_field_is_pure_and_vmaps_over_the_learning_rate(name, optimizer):
    flow, y = flow_of(name, optimizer), state_of(name, optimizer)
    field = jax.jit(jax.vmap(flow.vector_field, in_axes=(None, None, 0)))
    batch = field(0.0, y, RATES)
    chex.assert_tree_all_finite(batch)
    chex.assert_trees_all_equal(field(7.0, y, RATES), batch)  # autonomous, and pure
    for i, lr in enumerate(RATES):
        alone = field(0.0, y, jnp.full(3, lr))
        chex.assert_trees_all_equal(lane(alone, i), lane(batch, i))
    moved = lambda i: flow.centre(lane(batch, i)).params
    assert unlike(moved(0), moved(2)) > 0.5  # the rates differ by a factor of 5


@lru_cache
def solver_of(name, optimizer):
    """(lr, steps) -> the centre there, from scratch."""
    flow = flow_of(name, optimizer)
    solve = heun(flow)
    end = lambda lr, steps: solve(begun(flow, START, lr), lr, 4 * steps)
    return jax.jit(lambda lr, steps: flow.centre(end(lr, steps)).params)


# Whose order against the run of gradient descent test_order.py knows, or a relative's.
KNOWN = ("rod", "bundle", "modulated", "edge", "principal top")


@pytest.mark.parametrize(
    "name, optimizer",
    slow_but(
        lambda name, optimizer: (
            (name, optimizer) == ("modulated", "adam")
            or (optimizer == "sgd" and name in REGISTRY and name not in KNOWN)
        ),
        [
            pair
            for pair in PAIRS
            if pair[1] in ("sgd", "adam")
            and "plain" not in pair[0]
            and pair[0] != "stable"
        ],
    ),
)
def test_reduces_to_the_stable_flow(name, optimizer):
    # Equal times lr * steps. What sets the flows apart is of first order in lr, unless
    # it is the oscillation alone, of which there is none.
    solve, reference = solver_of(name, optimizer), solver_of("stable", optimizer)
    apart = [
        unlike(solve(lr, steps), reference(lr, steps))
        for lr, steps in [(0.008, 40), (0.001, 320)]
    ]
    assert apart[0] < 0.1 and apart[1] < max(0.5 * apart[0], 1e-12)


# A linearized gradient is evaluated once for all its products.
LINEARIZED = ("central", "principal", "principal top", "covariance")


@pytest.mark.parametrize(
    "name, optimizer",
    slow_but(
        lambda _, optimizer: optimizer == "sgd",
        [
            pair
            for pair in PAIRS
            if pair[1] in ("sgd", "adam") and pair[0] not in LINEARIZED
        ],
    ),
)
def test_evaluations_are_those_made(name, optimizer):
    loss = Counted(coupled)
    flow = built(name, rj.dynamics(OPTIMIZERS[optimizer], loss))
    field = jax.jit(flow.vector_field)
    spent = loss.spent(field, 0.0, state_of(name, optimizer), RATES[0])
    assert spent == flow.evaluations + flow.products
