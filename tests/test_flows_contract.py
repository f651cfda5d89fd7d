"""What every flow promises: all of the registry, and nine optimizers, in one table."""

import inspect
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    OPTIMIZERS,
    START,
    Counted,
    Traced,
    coupled,
    heun,
    lane,
    unlike,
)

import rodjax as rj
from rodjax.flows import REGISTRY
from rodjax.optimizer import REACH
from rodjax.solve import Reached


class Row(NamedTuple):
    """What is expected of a flow, written down apart from it.

    - `state`: the class of its state.
    - `evaluations`, `products`: in one call of the vector field, as it says of itself.
    - `offset`: 1/2 where its centre is the half-step midpoint.
    - `exact`: whether it is gradient descent at whole steps on any quadratic.
    """

    state: type
    evaluations: int = 1
    products: float = 0
    offset: float = 0.0
    exact: bool = False


#: One row for every flow of the registry.
ROWS = {
    "stable": Row(rj.State),
    "rod": Row(rj.flows.RodState, evaluations=4, offset=0.5),
    "modulated": Row(rj.flows.ModulatedState, evaluations=4),
    "edge": Row(rj.flows.EdgeState, evaluations=2, products=1),
    "central": Row(rj.flows.CentralState, products=math.nan),
    "covariance": Row(rj.flows.CovarianceState, products=9),
    "gradient": Row(rj.State),
    "igr": Row(rj.State, products=1),
    "third_order": Row(rj.State, products=3),
    "principal": Row(rj.flows.PrincipalState, products=math.nan, exact=True),
}
# Whom a record's word means.
SERVES = {
    "any": tuple(OPTIMIZERS),
    "preconditioned": ("sgd", "rmsprop", "scalar_rmsprop"),
    "gradient descent": ("sgd",),
}


class Variant(NamedTuple):
    """A flow of the registry with options, and the optimizers that it is tried on."""

    flow: str
    options: dict[str, Any]
    serves: tuple[str, ...] = ("sgd", "adam")


VARIANTS = {
    "rod plain": Variant("rod", {"bea": False}),
    "bundle": Variant("rod", {"rank": 3}, SERVES["preconditioned"]),
    "bundle plain": Variant("rod", {"rank": 3, "bea": False}, ("sgd",)),
    # The oracle, and less correction, see the optimizer as the others do.
    "dense": Variant("rod", {"dense": True}),
    "dense plain": Variant("rod", {"dense": True, "bea": False}),
    "modulated plain": Variant("modulated", {"bea": False}),
    "principal top": Variant("principal", {"rank": 2}, ("sgd",)),
}
FLOWS = {
    name: Variant(name, {}, SERVES[record.serves]) for name, record in REGISTRY.items()
} | VARIANTS
PAIRS = [(name, optimizer) for name in FLOWS for optimizer in FLOWS[name].serves]
# Of the flows that compile slowly, the optimizers of the quick suite.
QUICK = {
    "rod": ("sgd", "adam"),
    "rod plain": ("sgd",),
    "bundle": ("rmsprop",),
    "dense": ("adam",),
    "dense plain": ("sgd",),
    "modulated": ("sgd", "nadam"),
    "modulated plain": ("adam",),
    "edge": ("sgd", "nadam"),
    "central": ("sgd",),
}
DTYPES = jnp.dtype("float32"), jnp.dtype("float64")
KEY = jax.random.key(3)
RATES = jnp.array([0.002, 0.005, 0.01])


def slow_but(quick, pairs):
    """The pairs as parameters, slow unless they are among the quick."""
    return [
        pair if quick(*pair) else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in pairs
    ]


table = pytest.mark.parametrize(
    "name, optimizer",
    slow_but(lambda name, optimizer: optimizer in QUICK.get(name, OPTIMIZERS), PAIRS),
)


@lru_cache
def model(optimizer):
    return rj.dynamics(OPTIMIZERS[optimizer], coupled)


def built(name, dynamics):
    return REGISTRY[FLOWS[name].flow].build(dynamics, **FLOWS[name].options)


@lru_cache
def flow_of(name, optimizer):
    return built(name, model(optimizer))


def start(dtype):
    return optax.tree.cast(START, dtype)


@lru_cache
def window_of(optimizer, dtype=DTYPES[1]):
    """A window that alternates and drifts; no run is compiled for it."""
    zero = model(optimizer).init(start(dtype), lr=0.005)

    def at(ahead):
        swing = 1e-3 * ((-1.0) ** ahead + 0.1 * ahead)
        return rj.State(
            jax.tree.map(lambda x: x + swing, zero.phase),
            optax.tree.full_like(zero.slow, 0.1 + swing),
            jax.tree.map(lambda x: x + 10.0 + ahead, zero.clock),
        )

    states = rj.flows.stack(*(at(k) for k in range(-REACH, REACH + 1)))
    return rj.Window(states, jnp.asarray(10.0))


def begun(flow, where, lr):
    return flow.init(where, lr=lr, key=KEY)


@lru_cache
def state_of(name, optimizer):
    """A state of the flow, on numbers."""
    # With momentum what the modulated flow makes of a window takes long to compile.
    where = START if FLOWS[name].flow == "modulated" else window_of(optimizer)
    return jax.jit(partial(begun, flow_of(name, optimizer)))(where, RATES[0])


@lru_cache
def shapes_of(name, optimizer, dtype, scratch):
    """Shapes and dtypes of the state, its rate, and what is observed there."""
    flow = flow_of(name, optimizer)

    def look(where, lr):
        y = begun(flow, where, lr)
        return y, flow.vector_field(0.0, y, lr), flow.observe(y, lr=lr)

    where = start(dtype) if scratch else window_of(optimizer, dtype)
    # Gradient descent promotes no dtype by itself, so neither may a flow.
    promotion = "strict" if optimizer == "sgd" else "standard"
    with jax.numpy_dtype_promotion(promotion):
        return jax.eval_shape(look, where, jnp.asarray(0.1, dtype))


# --- the registry ---------------------------------------------------------------------


def test_every_flow_has_a_row():
    missing = sorted(set(REGISTRY) - set(ROWS))
    assert not missing, (
        f"no row of expected properties for {missing}: add one to ROWS in this file, "
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


@pytest.mark.parametrize(
    "name, optimizer",
    slow_but(
        lambda name, optimizer: optimizer == "sgd" or name in ("modulated", "edge"),
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


# --- solved ---------------------------------------------------------------------------

# A well of one leaf and the cheapest solver: neither is the point here.
WELL = Traced(lambda w: jnp.sum(w**2 + w**4))
BEGIN = START["a"]
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
        # These three are the same code.
        lambda name, optimizer: optimizer == "sgd" and name not in ("igr", "gradient"),
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
    assert bool(jnp.isnan(batch.diverged_at).all())
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


# --- whom it serves -------------------------------------------------------------------


# In an order that all workers of the suite agree on.
@pytest.mark.parametrize(
    "optimizer", sorted(set(OPTIMIZERS) - set(SERVES["preconditioned"]))
)
def test_bundle_refuses_momentum(optimizer):
    flow = rj.flows.rod(model(optimizer), rank=2)
    for where in (START, window_of(optimizer)):
        with pytest.raises(ValueError, match="modulated"):
            jax.eval_shape(partial(begun, flow), where, jnp.asarray(0.01))


# Kin of gradient descent and of RMSProp that neither word means.
REFUSED = {
    "clipped": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "decayed": lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
    "signs": optax.sign_sgd,
    "clipped rmsprop": lambda lr: optax.chain(optax.clip(1.0), optax.rmsprop(lr)),
    "adam without momentum": partial(optax.adam, b1=0.0),
}
SCHEDULE = optax.linear_schedule(0.0, 0.1, 10)
STARTS = {
    "gradient descent": rj.flows.gradient_descent_start,
    "preconditioned": rj.flows.preconditioned_start,
}


def refused(name):
    words = rf"^{name} models .*use rodjax\.flows\.stable, rod"
    return pytest.raises(ValueError, match=words)


@pytest.mark.parametrize("serves", STARTS)
def test_who_is_served_and_who_refused(serves):
    def look(optimizer, lr=None):
        dynamics = rj.dynamics(optimizer, coupled)
        return STARTS[serves](dynamics, START, "this", lr=lr)

    for optimizer in (optax.sgd(SCHEDULE), optax.sgd(0.1)):
        chex.assert_trees_all_equal(look(optimizer).params, START)
    for optimizer, build in (OPTIMIZERS | REFUSED).items():
        if optimizer in SERVES[serves]:
            look(build, jnp.asarray(0.01))
        else:
            with refused("this"):
                look(build, jnp.asarray(0.01))


SPECIAL = [name for name in FLOWS if REGISTRY[FLOWS[name].flow].serves != "any"]


@pytest.mark.parametrize("name", SPECIAL)
def test_serves_whom_its_record_says(name):
    record = REGISTRY[FLOWS[name].flow]
    nearest = {"gradient descent": "rmsprop", "preconditioned": "clipped rmsprop"}
    for optimizer in (nearest[record.serves], "clipped"):
        flow = built(name, rj.dynamics((OPTIMIZERS | REFUSED)[optimizer], coupled))
        with refused(record.name):
            begun(flow, START, jnp.asarray(0.01))
    scheduled = built(name, rj.dynamics(optax.sgd(SCHEDULE), coupled))
    jax.eval_shape(partial(begun, scheduled), START, None)


OPTIONS = [
    *(
        (name, {"rank": rank})
        for name, r in REGISTRY.items()
        if r.rank
        for rank in (0, -2)
    ),
    *((name, {"floor": -1e-9}) for name, r in REGISTRY.items() if r.floor),
    ("central", {"gamma": 0.0}),
]


@pytest.mark.parametrize("name, options", OPTIONS)
def test_refuses_bad_options(name, options):
    (option,) = options
    message = f"{option} must be {'positive' if option == 'gamma' else 'at least'}"
    with pytest.raises(ValueError, match=message):
        REGISTRY[name].build(model("sgd"), **options)
