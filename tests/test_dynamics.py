"""The update map against plain Optax, and the split of its state."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

import rodjax as rj
from rodjax.optimizer import merge, split_like

PARAMS = {"a": jnp.array([[0.3, -0.2], [0.5, 1.0]]), "b": jnp.array([0.1, -0.4])}
COSINE = optax.cosine_decay_schedule(0.1, 30)


def loss(params):
    """Not quadratic, and bounded below."""
    a, b = params["a"], params["b"]
    return jnp.sum(jnp.tanh(a @ b) ** 2) + 0.1 * jnp.sum(a**4) + jnp.sum(jnp.cos(b))


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "heavy ball": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.05),
    "rmsprop momentum": optax.rmsprop(0.05, momentum=0.9, eps_in_sqrt=False),
    "rmsprop debiased": optax.rmsprop(0.05, bias_correction=True),
    # A default eps divides by the rounding error of nu - mu^2 at the first step.
    "rmsprop centered": optax.rmsprop(0.05, eps=1e-2, centered=True),
    "adam": optax.adam(0.1),
    "adam eps_root": optax.adam(0.1, eps_root=1e-6),
    "adam schedule": optax.adam(COSINE),
    "nadam": optax.nadam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "adamax": optax.adamax(0.1),
    "adabelief": optax.adabelief(0.1),
    "yogi": optax.yogi(0.1),
    "amsgrad schedule": optax.amsgrad(COSINE),
    "lion": optax.lion(0.01),
    "adagrad": optax.adagrad(0.1),
    "radam": optax.radam(0.1, b2=0.9),
    "lamb": optax.lamb(0.05),
    "adadelta": optax.adadelta(0.5),
    "novograd": optax.novograd(0.05),
    "adan": optax.adan(0.05),
    "ademamix": optax.contrib.ademamix(0.05),
    "schedule-free": optax.contrib.schedule_free_adamw(0.05),
    "polyak": optax.polyak_sgd(0.1),
    "inject": optax.inject_hyperparams(optax.adam)(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
    "scalar rmsprop": rj.transforms.scalar_rmsprop(0.05),
    "scalar adam": rj.transforms.scalar_adam(0.1),
    "scalar nadam": rj.transforms.scalar_nadam(0.1),
}


def plain_step(optimizer, params, state):
    """One step as Optax's documentation writes it."""
    value, grad = jax.value_and_grad(loss)(params)
    updates, state = optax.with_extra_args_support(optimizer).update(
        grad, state, params, value=value, grad=grad, value_fn=loss
    )
    return updates, (optax.apply_updates(params, updates), state)


def names(part):
    """Paths of a split part's leaves: "w" is the parameters', else Optax's own."""
    paths = [path for path, _ in tree_leaves_with_path(part)]
    return {("w" if p[0].idx == 0 else "") + keystr(p[1:]) for p in paths}


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# One of each kind; the others are slow.
QUICK = {
    *("sgd", "nesterov", "rmsprop debiased", "adam schedule", "adamw", "lion", "radam"),
    *("adadelta", "polyak", "inject", "clip", "scalar nadam"),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_update_is_the_optax_step(name):
    optimizer = OPTIMIZERS[name]
    dynamics = rj.dynamics(optimizer, loss)

    @jax.jit
    def both(params):
        def step(carry, _):
            state, plain = carry
            carry = (dynamics.update(state), plain_step(optimizer, *plain)[1])
            return carry, (merge(carry[0]), carry[1])

        carry = (dynamics.init(params), (params, optimizer.init(params)))
        return jax.lax.scan(step, carry, length=10)[1]

    ours, optaxs = both(PARAMS)

    def compare(x, y):
        x, y = np.asarray(x), np.asarray(y, x.dtype)
        assert x.shape == y.shape
        # Leaf by leaf: an entry may be a difference of much larger ones.
        assert np.abs(x - y).max() <= 1e-12 * np.abs(y).max()

    jax.tree.map(compare, ours, optaxs)
    assert float(jnp.abs(ours[0]["a"][-1] - PARAMS["a"]).max()) > 1e-3


SPLITS = {
    "sgd": (set(), set(), set()),
    "adam": ({"[0].mu"}, {"[0].nu"}, {"[0].count"}),
    "rmsprop momentum": ({"[2].trace"}, {"[0].nu"}, set()),
    "adagrad": (set(), {"[0].sum_of_squares"}, set()),
    "adadelta": (set(), {"[1].e_g", "[1].e_x"}, set()),
    "adan": ({"[0].m", "[0].v", "[0].g"}, {"[0].n"}, {"[0].t"}),
    "ademamix": ({"[0].m1", "[0].m2"}, {"[0].nu"}, {"[0].count", "[0].count_m2"}),
    "amsgrad schedule": (
        {"[0].mu"},
        {"[0].nu", "[0].nu_max"},
        {"[0].count", "[1].count"},
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_split(name):
    optimizer = OPTIMIZERS[name]
    state = rj.dynamics(optimizer, loss).init(PARAMS)
    phase, slow, clock = SPLITS[name]
    both = lambda fields: {f"{f}['{leaf}']" for f in fields for leaf in "ab"}
    assert names(state.phase) == both(phase | {"w"})
    assert names(state.slow) == both(slow)
    assert names(state.clock) == clock
    whole = merge(state)
    assert_same(whole[0], PARAMS)
    assert jax.tree.structure(whole[1]) == jax.tree.structure(optimizer.init(PARAMS))
    assert_same(split_like(whole, state), state)
    assert_same(state.params, PARAMS)


def test_scalar_second_moment_is_one_slow_leaf():
    state = rj.dynamics(OPTIMIZERS["scalar adam"], loss).init(PARAMS)
    assert names(state.slow) == {"[0].nu"} and jax.tree.leaves(state.slow)[0].ndim == 0


def test_user_keys_named_like_optax_fields_are_phase():
    square = lambda p: jnp.sum(p["nu"] ** 2) + p["count"] ** 2
    params = {"nu": jnp.ones(2), "count": jnp.ones(())}
    state = rj.dynamics(optax.adam(0.1), square).init(params)
    moments = {"[0].mu['nu']", "[0].mu['count']"}
    assert names(state.phase) == {"w['nu']", "w['count']"} | moments
    assert names(state.slow) == {"[0].nu['nu']", "[0].nu['count']"}


# Attributes for keys, as in any module class.
Attributes = namedtuple("Attributes", ["nu", "w"])


def test_user_attributes_named_like_optax_fields_are_phase():
    square = lambda p: jnp.sum(p.nu**2 + p.w**2)
    params = Attributes(jnp.ones(2), jnp.ones(2))
    state = rj.dynamics(optax.adam(0.1), square).init(params)
    assert names(state.slow) == {"[0].nu.nu", "[0].nu.w"}


def test_kind_overrides_the_split():
    kind = lambda path, leaf: "slow" if "trace" in keystr(path) else None
    state = rj.dynamics(OPTIMIZERS["heavy ball"], loss, kind=kind).init(PARAMS)
    assert names(state.phase) == {"w['a']", "w['b']"}
    assert names(state.slow) == {"[0].trace['a']", "[0].trace['b']"}


def test_bad_kind_is_named():
    dynamics = rj.dynamics(optax.adam(0.1), loss, kind=lambda path, leaf: "fast")
    with pytest.raises(ValueError, match=r"'fast' for \[0\]\.count"):
        dynamics.init(PARAMS)


@pytest.mark.parametrize("name", ["heavy ball", "adam schedule", "rmsprop", "lion"])
def test_increment_is_the_update_less_the_state(name):
    optimizer = OPTIMIZERS[name]
    dynamics = rj.dynamics(optimizer, loss)
    state = dynamics.update(dynamics.update(dynamics.init(PARAMS)))
    step = dynamics.increment(state)
    new = dynamics.update(state)
    # Nothing is subtracted from the parameters: a tiny update keeps its digits.
    updates, _ = plain_step(optimizer, *merge(state))
    assert_same(step.params, updates)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-15)
    jax.tree.map(close, optax.tree.add(state, step), new)


@pytest.mark.parametrize("name", ["adamw", "scalar nadam"])
def test_respond_to_the_gradient_is_the_update(name):
    dynamics = rj.dynamics(OPTIMIZERS[name], loss)
    state = dynamics.update(dynamics.init(PARAMS))
    got = dynamics.respond(state, jax.grad(loss)(state.params))
    assert_same(got, dynamics.update(state))


KEY = jax.random.key(0)
REFUSED = {
    "noise": (
        lambda: optax.chain(optax.add_noise(0.1, 0.5, key=KEY), optax.sgd(0.1)),
        r"state\[0\]\.rng_key of dtype key.* changes from step to step",
    ),
    "noisy sgd": (lambda: optax.noisy_sgd(0.1, key=KEY), r"rng_key"),
    "flag": (
        lambda: optax.optimistic_gradient_descent(0.1),
        r"is_initial_step of dtype bool .* changes from step to step",
    ),
    "every fourth": (
        lambda: optax.chain(optax.apply_every(4), optax.sgd(0.1)),
        r"params\['a'\] leaves out up to 3 steps in a row",
    ),
    "accumulated": (
        lambda: optax.MultiSteps(optax.sgd(0.1), 20).gradient_transformation(),
        r"leaves out up to 19 steps in a row",
    ),
    "table": (
        lambda: optax.sgd(lambda n: jnp.linspace(0.1, 0.2, 50)[n]),
        r"cannot read its step counter between two steps .* jnp.interp",
    ),
    "line search": (optax.lbfgs, r"is not finite from the first steps on"),
    "neither": (
        lambda: optax.chain(optax.ema(0.9), optax.stateless(one_sided), optax.sgd(0.1)),
        r"update of params\['a'\] neither changes its sign",
    ),
}


def one_sided(updates, params):
    return jax.tree.map(lambda g: jnp.maximum(g, 0.1 * g), updates)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow)
        if n not in ("every fourth", "table", "neither")
        else n
        for n in REFUSED
    ],
)
def test_what_no_flow_can_carry_runs_as_optax_has_it(name):
    """The optimizer's own run is exact, integers, flags and all; flows say why not."""
    make, message = REFUSED[name]
    optimizer = make()
    dynamics = rj.dynamics(optimizer, loss)
    run = rj.descend(dynamics, PARAMS, 9)
    assert np.isinf(run.diverged_at)
    step = jax.jit(lambda whole: plain_step(optimizer, *whole)[1])
    whole = (PARAMS, optimizer.init(PARAMS))
    for t in range(11):
        for name, end in run.ends.items():
            x = end[t, 0] if t < 10 else end[9, 1]
            np.testing.assert_allclose(x, whole[0][name], rtol=1e-12, atol=1e-14)
        whole = step(whole)
    for flow in (rj.flows.stable(dynamics), rj.flows.modulated(dynamics)):
        for start in (PARAMS, run.final):
            with pytest.raises(ValueError, match=message):
                rj.integrate(flow, start, 4)


def test_vmapped_learning_rates_equal_single_runs():
    dynamics = rj.dynamics(optax.adam, loss)
    run = lambda lr: rj.descend(dynamics, PARAMS, 5, lr=lr).ends
    rates = jnp.array([0.01, 0.1, 0.3])
    close = lambda m, *s: np.testing.assert_allclose(m, s, atol=1e-14)
    jax.tree.map(close, jax.vmap(run)(rates), *(run(rate) for rate in rates))


def test_hyperparameters_may_be_a_dictionary():
    dynamics = rj.dynamics(lambda hp: optax.adam(hp["lr"], b1=hp["b1"]), loss)
    run = rj.descend(dynamics, PARAMS, 5, lr={"lr": 0.1, "b1": 0.5})
    plain = rj.descend(rj.dynamics(optax.adam(0.1, b1=0.5), loss), PARAMS, 5)
    np.testing.assert_allclose(run.ends["a"], plain.ends["a"], rtol=1e-12)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float32", pytest.param("float64", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("factory", [optax.adam, rj.transforms.scalar_adam])
def test_dtypes_are_kept_and_clocks_count_in_integers(dtype, factory):
    scheduled = lambda lr: factory(lambda count: lr / (1.0 + count))
    params = optax.tree.cast(PARAMS, dtype)
    dynamics = rj.dynamics(scheduled, loss)
    lr = dynamics.cast(params, lr=0.1)
    state, update = dynamics.init(params, lr=lr), jax.jit(dynamics.update)
    for _ in range(3):
        new = update(state, lr=lr)
        same = lambda x, y: x.dtype == y.dtype and not y.weak_type
        assert jax.tree.all(jax.tree.map(same, state, new))
        state = new
    assert {str(x.dtype) for x in jax.tree.leaves((state.phase, state.slow))} == {dtype}
    # bfloat16 could not count beyond 256.
    wide = jnp.promote_types(dtype, jnp.float32)
    clocks = state.clock, dynamics.fluid(state, lr=lr).clock
    for clock, kind in zip(clocks, (jnp.int32, wide), strict=True):
        for count in jax.tree.leaves(clock):
            assert count.dtype == kind and float(count) == 3.0


def test_absent_leaves_and_python_numbers_are_welcome():
    dynamics = rj.dynamics(optax.adam(0.1), lambda p: p["x"] ** 2)
    state = dynamics.update(dynamics.init({"x": 1.0, "static": None}))
    assert state.params["static"] is None
    assert float(state.params["x"]) == pytest.approx(0.9)
