"""What every flow promises, over all flows and nine optimizers in one table."""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import _central as central, _covariance as covariance, _edge as edge, _gradient as gradient, _modulated as modulated, _principal as principal, _rod as rod, _stable as stable, igr, third_order
from rodjax.transforms import scalar_adam, scalar_nadam, scalar_rmsprop

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "nadam": optax.nadam,
    "scalar_rmsprop": scalar_rmsprop,
    "scalar_adam": scalar_adam,
    "scalar_nadam": scalar_nadam,
}
# Those whose phase is the parameters alone.
BARE = ("sgd", "rmsprop", "scalar_rmsprop")
FLOWS = {
    "stable": stable,
    "rod": rod,
    "rod plain": partial(rod, bea=False),
    "bundle": partial(rod, rank=3),
    "bundle plain": partial(rod, rank=3, bea=False),
    "dense": partial(rod, dense=True),
    "dense plain": partial(rod, dense=True, bea=False),
    "modulated": modulated,
    "modulated plain": partial(modulated, bea=False),
    "edge": edge,
    "central": central,
    "gradient": gradient,
    "igr": igr,
    "third order": third_order,
    "principal": principal,
    "principal top": partial(principal, top=2),
    "covariance": covariance,
}
# Which optimizers a flow serves, if not all.
SERVES = {
    "bundle": BARE,
    "bundle plain": ("sgd",),
    "central": BARE,
    "gradient": ("sgd",),
    "igr": ("sgd",),
    "third order": ("sgd",),
    "principal": ("sgd",),
    "principal top": ("sgd",),
    "covariance": ("sgd",),
    # The dense oracle, and less correction, see the optimizer as the others do.
    "rod plain": ("sgd", "adam"),
    "dense": ("sgd", "adam"),
    "dense plain": ("sgd", "adam"),
    "modulated plain": ("sgd", "adam"),
}
PAIRS = [
    (name, optimizer)
    for name in FLOWS
    for optimizer in SERVES.get(name, tuple(OPTIMIZERS))
]
# Of the flows that compile slowly, the optimizers of the quick suite.
QUICK = {
    "rod": ("sgd", "adam"),
    "rod plain": ("sgd",),
    "bundle": ("rmsprop",),
    "dense": ("adam",),
    "dense plain": ("sgd",),
    "modulated": ("sgd", "nesterov", "scalar_adam", "nadam"),
    "edge": ("sgd", "nadam"),
    "central": ("sgd",),
}


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
# One optimizer per flow where a check compiles the whole solve.
SOLVED = [
    ("stable", "scalar_rmsprop"),
    ("rod", "adam"),
    ("bundle", "sgd"),
    ("dense", "momentum"),
    ("modulated", "rmsprop"),
    ("edge", "momentum"),
    ("central", "scalar_rmsprop"),
    ("third order", "sgd"),
    ("principal", "sgd"),
    ("principal top", "sgd"),
    ("covariance", "sgd"),
]
solved = pytest.mark.parametrize(
    "name, optimizer",
    slow_but(lambda name, _: name in ("stable", "modulated", "principal top"), SOLVED),
)
DTYPES = jnp.dtype("float32"), jnp.dtype("float64")
KEY = jax.random.key(3)
RATES = jnp.array([0.002, 0.005, 0.01])
calls = [0]


def tilted_valley(params):
    """Smooth, not quadratic, in a pytree of two leaves of different rank."""
    calls[0] += 1
    a, b = params["a"], params["b"]
    curvature = jnp.array([3.0, 1.0, 0.5], a.dtype)
    return 0.5 * a @ (curvature * a) + jnp.cosh(jnp.sum(a) - b) + 0.1 * b**4


def start(dtype=jnp.float64):
    params = {"a": jnp.array([0.8, -0.6, 0.9], dtype), "b": jnp.array(1.1, dtype)}
    return params


@lru_cache
def model(optimizer):
    return rj.dynamics(OPTIMIZERS[optimizer], tilted_valley)


@lru_cache
def flow_of(name, optimizer):
    return FLOWS[name](model(optimizer))


@lru_cache
def window_of(optimizer, dtype=jnp.float64):
    return rj.warm_up(model(optimizer), start(dtype), steps=10, lr=0.005)


@lru_cache
def solver_of(name, optimizer):
    """(lr, steps) -> the centre there, from scratch, by Heun's method, four substeps.

    A bare loop: it compiles quickly, and refuses a field that is not like its state.
    """
    flow = flow_of(name, optimizer)

    @jax.jit
    def solve(lr, steps):
        def heun(_, y):
            first = flow.vector_field(0.0, y, lr)
            there = optax.tree.add_scale(y, 0.25, first)
            second = flow.vector_field(0.25, there, lr)
            return optax.tree.add_scale(y, 0.125, optax.tree.add(first, second))

        y = flow.init(start(), lr=lr, key=KEY)
        return flow.centre(jax.lax.fori_loop(0, 4 * steps, heun, y)).params

    return solve


def unlike(a, b):
    """Relative distance of two pytrees."""
    return float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))


@table
def test_field_is_like_the_state_in_both_precisions(name, optimizer):
    flow = flow_of(name, optimizer)
    # One precision from scratch, the other from a window.
    for dtype, begin in zip(
        DTYPES, (start(DTYPES[0]), window_of(optimizer)), strict=True
    ):
        lr = jnp.asarray(0.1, dtype)
        y = jax.eval_shape(flow.init, begin, lr, KEY)
        dy = jax.eval_shape(flow.vector_field, 0.0, y, lr)
        chex.assert_trees_all_equal_shapes_and_dtypes(y, dy)
        assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {dtype}
        centre = jax.eval_shape(flow.centre, y).params
        chex.assert_trees_all_equal_shapes_and_dtypes(centre, start(dtype))
        ends, report = jax.eval_shape(flow.observe, y, lr)
        assert {value.dtype for value in report.values()} <= {dtype}
        each = jax.eval_shape(lambda e: jax.tree.map(lambda x: x[0], e), ends)
        chex.assert_trees_all_equal_shapes_and_dtypes(each, start(dtype))


@table
def test_field_is_pure_and_vmaps_over_the_learning_rate(name, optimizer):
    flow = flow_of(name, optimizer)
    y = flow.init(window_of(optimizer), lr=RATES[0], key=KEY)
    field = jax.jit(jax.vmap(flow.vector_field, in_axes=(None, None, 0)))
    batch = field(0.0, y, RATES)
    chex.assert_tree_all_finite(batch)
    chex.assert_trees_all_equal(field(7.0, y, RATES), batch)  # autonomous, and pure
    for i, lr in enumerate(RATES):
        alone = field(0.0, y, jnp.full(3, lr))
        lane = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        chex.assert_trees_all_equal(lane(alone), lane(batch))
    moved = lambda i: flow.centre(jax.tree.map(lambda x: x[i], batch)).params
    assert unlike(moved(0), moved(2)) > 0.5  # the rates differ by a factor of 5


@pytest.mark.parametrize(
    "optimizer", ["sgd", "adam", pytest.param("momentum", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [name for name in FLOWS if "plain" not in name][1:])
def test_reduces_to_the_stable_flow(name, optimizer):
    if (name, optimizer) not in PAIRS:
        return
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
    "optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [name for name in FLOWS if name not in LINEARIZED])
def test_evaluations_are_those_made(name, optimizer):
    if (name, optimizer) not in PAIRS:
        return
    count = [0]

    def counted(params):
        # Called at run time, and under vmap once for each of the batch.
        jax.debug.callback(lambda _: count.__setitem__(0, count[0] + 1), params["b"])
        return tilted_valley(params)

    flow = FLOWS[name](rj.dynamics(OPTIMIZERS[optimizer], counted))
    lr = jnp.asarray(0.01)
    y = flow.init(window_of(optimizer), lr=lr, key=KEY)
    jax.effects_barrier()
    before = count[0]
    jax.block_until_ready(flow.vector_field(0.0, y, lr))
    jax.effects_barrier()
    assert count[0] - before == flow.evaluations + flow.products


@solved
def test_integrate_compiles_once_and_vmaps(name, optimizer):
    flow = flow_of(name, optimizer)
    begin = window_of(optimizer)
    solve = lambda lr: rj.integrate(flow, begin, steps=4, lr=lr, substeps=2)
    alone = [solve(float(RATES[0]))]
    traced = calls[0]
    alone += [solve(RATES[i]) for i in (1, 2)]
    alone[0] = solve(RATES[0])
    assert calls[0] == traced
    chex.clear_trace_counter()
    # Chex refuses to wrap what JAX has transformed.
    every = lambda rates: jax.vmap(solve)(rates)  # noqa: PLW0108
    once = jax.jit(chex.assert_max_traces(every, n=1))
    batch = once(RATES)
    chex.assert_trees_all_equal(once(RATES), batch)
    once(2.0 * RATES)
    chex.assert_tree_all_finite(batch._replace(diverged_at=0.0))
    # Within rounding, which the spare rods of a bundle amplify.
    for i, path in enumerate(alone):
        same = lambda a, b, i=i: np.testing.assert_allclose(a, b[i], 1e-4, 1e-9)
        jax.tree.map(same, path, batch)
    # The learning rate counts.
    assert unlike(alone[0].params, alone[2].params) > 1e-3
    # What is left can be gone on from.
    more = jax.vmap(flow.vector_field, in_axes=(None, 0, 0))(0.0, batch.final, RATES)
    chex.assert_trees_all_equal_shapes_and_dtypes(more, batch.final)


@solved
def test_float32_stays_float32(name, optimizer):
    flow = flow_of(name, optimizer)
    solve = lambda start: rj.integrate(flow, start, steps=2, lr=0.01)
    path = jax.eval_shape(solve, start(DTYPES[0]))
    kept = (path.params, path.ends, path.metrics, path.final)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {DTYPES[0]}


@pytest.mark.parametrize("name", FLOWS)
def test_strict_promotion(name):
    flow = flow_of(name, "sgd")
    for dtype in DTYPES:
        begin = window_of("sgd", dtype)
        lr = jnp.asarray(0.01, dtype)
        with jax.numpy_dtype_promotion("strict"):
            y = jax.eval_shape(flow.init, begin, lr, KEY)
            jax.eval_shape(flow.vector_field, 0.0, y, lr)
            jax.eval_shape(flow.init, start(dtype), lr, KEY)
            jax.eval_shape(flow.observe, y, lr)


@solved
def test_no_leaked_tracers(name, optimizer):
    # Not around diffrax: within a scan its first call alone trips this check.
    flow = FLOWS[name](model(optimizer))

    @jax.jit
    @jax.vmap
    def field(lr):
        return flow.vector_field(0.0, flow.init(start(), lr=lr, key=KEY), lr)

    with jax.checking_leaks():
        chex.assert_tree_all_finite(field(RATES))


@pytest.mark.parametrize("name", FLOWS)
def test_is_a_tuple_of_functions(name):
    flow = flow_of(name, "sgd")
    assert isinstance(flow, rj.flows.Flow) and flow.dynamics is model("sgd")
    functions = flow.init, flow.vector_field, flow.centre, flow.observe
    assert all(callable(function) for function in functions)
    assert flow.offset == (0.5 if name.split()[0] in ("rod", "bundle", "dense") else 0)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - set(BARE)))
def test_bundle_refuses_momentum(optimizer):
    flow = rod(model(optimizer), rank=2)
    for begin in (start(), window_of(optimizer)):
        with pytest.raises(ValueError, match="modulated"):
            flow.init(begin, lr=jnp.asarray(0.01), key=KEY)


REFUSED = {
    "clipped": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "decayed": lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
    "signs": optax.sign_sgd,
    "clipped rmsprop": lambda lr: optax.chain(optax.clip(1.0), optax.rmsprop(lr)),
    "adam without momentum": partial(optax.adam, b1=0.0),
}
SCHEDULE = optax.linear_schedule(0.0, 0.1, 10)
SPECIAL = [name for name, served in SERVES.items() if served in (BARE, ("sgd",))]


@pytest.mark.parametrize("name", [n for n in SPECIAL if not n.startswith("bundle")])
def test_serves_whom_it_says_and_refuses_others(name):
    def begin(optimizer, lr=None):
        flow = FLOWS[name](rj.dynamics(optimizer, tilted_valley))
        jax.eval_shape(flow.init, start(), lr, KEY)

    begin(optax.sgd(SCHEDULE))
    begin(optax.sgd(0.1))
    for optimizer, build in (OPTIMIZERS | REFUSED).items():
        if optimizer in SERVES[name]:
            begin(build, jnp.asarray(0.01))
        else:
            with pytest.raises(ValueError, match=r"use rodjax\.flows\.stable, rod"):
                begin(build, jnp.asarray(0.01))


@pytest.mark.parametrize(
    "build, message",
    [
        (partial(rod, rank=0), "rank must be at least 1"),
        (partial(rod, rank=-2), "rank must be at least 1"),
        (partial(modulated, seed=-1e-9), "seed must be at least 0"),
        (partial(edge, seed=-1e-9), "seed must be at least 0"),
        (partial(covariance, seed=-1e-9), "seed must be at least 0"),
        (partial(covariance, rank=0), "rank must be at least 1"),
        (partial(central, top=0), "top must be at least 1"),
        (partial(central, gamma=0.0), "gamma must be positive"),
        (partial(principal, top=0), "top must be at least 1"),
    ],
)
def test_refuses_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(model("sgd"))
