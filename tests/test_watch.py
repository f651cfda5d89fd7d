"""`rj.training.watch`: nothing of the optimizer changes, and it works in any loop."""

import warnings
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Counted
from optax import contrib

import rodjax as rj
from rodjax.training import STATUS, report, watch

START = {"a": jnp.array([[0.8, -0.6], [0.9, 0.3]]), "b": jnp.array([1.1, -0.2])}
FREE = ("update_ratio", "realized_edge")
LIGHT = (*FREE, "step_curvature")


def loss(w, shift=0.0):
    """Smooth, coupled, not quadratic."""
    return (
        jnp.cosh(jnp.sum(w["a"]) - w["b"][0] + shift)
        + jnp.sum(w["a"] ** 2 * jnp.array([[2.0, 0.7]]))
        + 0.1 * jnp.sum(w["b"] ** 4)
    )


def labelled():
    parts: dict[Any, Any] = {"x": optax.sgd(0.05, momentum=0.9), "y": optax.adam(0.05)}
    return optax.multi_transform(parts, {"a": "x", "b": "y"})


def masked():
    part = optax.masked(optax.trace(0.9), {"a": True, "b": False})
    return optax.chain(part, optax.sgd(0.05))


#: Built anew for each test: name -> optimizer.
OPTIMIZERS = {
    "sgd": partial(optax.sgd, 0.05),
    "heavy ball": partial(optax.sgd, 0.05, momentum=0.9),
    "nesterov": partial(optax.sgd, 0.05, momentum=0.9, nesterov=True),
    "adam": partial(optax.adam, 0.05),
    "adamw": partial(optax.adamw, 0.05),
    "nadam": partial(optax.nadam, 0.05),
    "rmsprop": partial(optax.rmsprop, 0.05),
    "lion": partial(optax.lion, 0.05),
    "adafactor": partial(optax.adafactor, 0.05),
    "muon": partial(contrib.muon, 0.05),
    "prodigy": partial(contrib.prodigy, 1.0),
    "schedule_free": partial(contrib.schedule_free_adamw, 0.05),
    "sam": lambda: contrib.sam(optax.sgd(0.05), optax.sgd(0.05), sync_period=2),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05)),
    "multi_transform": labelled,
    "masked": masked,
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.05), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.05),
    "schedule": lambda: optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, 10)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "accumulated noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(0.05)
    ),
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)
    ),
    "plateau": lambda: optax.chain(optax.sgd(0.05), contrib.reduce_on_plateau()),
}


def plain(optimizer):
    """As Optax's own wrappers have it: MultiSteps is no transformation by itself."""
    if isinstance(optimizer, optax.MultiSteps):
        return optimizer.gradient_transformation()
    return optimizer


SHIFTS = 0.1 * jnp.arange(7)
ALL = ("value", "grad", "value_fn")


def descended(optimizer, names, given):
    """Updates and inner states of some steps, by `jax.lax.scan`.

    `given`: the losses and gradients. They come in from outside, since the compiler
    rounds a gradient anew with every use that is made of it.
    """

    def step(carry, inputs):
        (params, state), (shift, value, grad) = carry, inputs
        extra = {"value": value, "grad": grad, "value_fn": lambda w: loss(w, shift)}
        extra = {name: extra[name] for name in names}
        updates, state = optimizer.update(grad, state, params, **extra)
        return (optax.apply_updates(params, updates), state), (updates, state)

    _, path = jax.jit(lambda carry: jax.lax.scan(step, carry, (SHIFTS, *given)))(
        (START, optimizer.init(START))
    )
    return path


def gradients(optimizer, names):
    """The losses and gradients that a plain loop meets."""
    look = jax.jit(jax.value_and_grad(loss))

    @jax.jit
    def step(params, state, shift, value, grad):
        extra = {"value": value, "grad": grad, "value_fn": lambda w: loss(w, shift)}
        extra = {name: extra[name] for name in names}
        updates, state = optimizer.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state, met = START, optimizer.init(START), []
    for shift in SHIFTS:
        met.append(look(params, shift))
        params, state = step(params, state, shift, *met[-1])
    return jax.tree.map(lambda *x: jnp.stack(x), *met)


def without_keys(tree):
    """Random keys as numbers."""
    key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if key(x) else x, tree)


def assert_unchanged(optimizer, own, **settings):
    given = gradients(optimizer, own)
    expected = descended(optimizer, own, given)
    updates, state = descended(watch(optimizer, every=3, **settings), ALL, given)
    chex.assert_trees_all_equal(
        without_keys((updates, state.inner)), without_keys(expected)
    )


EXTRA = {"lbfgs", "backtracking", "plateau"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_and_state_are_bit_for_bit_those_without(name):
    own = ALL if name in EXTRA else ()
    # The compiler joins sums and products of these differently in every program.
    with jax.disable_jit(name in ("nesterov", "nadam", "schedule_free", "muon")):
        assert_unchanged(plain(OPTIMIZERS[name]()), own, quantities=LIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "clipped", "multi_transform"])
def test_so_they_are_with_all_that_can_be_watched(name):
    left_out = ("block_sharpness", "share", "noise_interaction")
    names = [q for q in rj.training.QUANTITIES if q not in left_out]
    by = lambda path: path[0].key
    assert_unchanged(plain(OPTIMIZERS[name]()), (), quantities=names, by=by)


def stepper(tx, value_fn=loss, **more):
    """A jitted step (params, state) -> (params, state) as a loop has it."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, value_fn=value_fn, **more
        )
        return optax.apply_updates(params, updates), state

    return step


def test_one_compilation_serves_a_loop_whose_report_is_read():
    chex.clear_trace_counter()
    tx = watch(optax.adam(0.01), every=2)
    step, params, state = stepper(tx), START, tx.init(START)
    words = []
    for _ in range(5):
        params, state = step(params, state)
        words.append(STATUS[int(report(state)["status"])])
    found = report(state)
    assert words[:2] == ["no second moment yet"] * 2 and words[2] in STATUS[2:]
    assert int(found["probed_at"]) == 4 and int(found["step"]) == 5
    assert all(np.isfinite(x) for x in found.values())


def test_a_healthy_run_holds_no_nan():
    chex.clear_trace_counter()
    quantities = (*LIGHT, "oscillation", "alternation", "sharpness_ratio")
    tx = watch(optax.adam(0.01), every=2, quantities=quantities)
    step, params, state = stepper(tx), START, tx.init(START)
    with jax.debug_nans(True):
        for _ in range(3):
            # Not even before anything is known, nor in what is then reported.
            report(state)
            params, state = step(params, state)
    chex.assert_tree_all_finite(state)


def test_lanes_of_learning_rates_have_a_report_each():
    rates, curvature = jnp.array([0.1, 0.5]), 3.0
    bowl = lambda w: 0.5 * curvature * jnp.sum(w**2)
    names = ("sharpness_ratio", "realized_edge")
    tx = watch(optax.inject_hyperparams(optax.sgd)(0.1), every=2, quantities=names)

    def run(rate):
        params = jnp.array([1.0, 0.5])
        state: Any = tx.init(params)
        state.inner.hyperparams["learning_rate"] = rate
        for _ in range(3):
            updates, state = tx.update(
                jax.grad(bowl)(params), state, params, value_fn=bowl
            )
            params = optax.apply_updates(params, updates)
        return state

    found = report(jax.jit(jax.vmap(run))(rates))
    np.testing.assert_allclose(found["sharpness_ratio"], rates * curvature / 2)
    np.testing.assert_allclose(found["realized_edge"], rates * curvature / 2)
    assert [STATUS[x] for x in found["status"]] == ["below", "below"]


def test_lanes_skip_together_what_a_single_run_skips():
    counted = Counted(loss)
    tx = watch(optax.sgd(0.1), every=3, quantities=("step_curvature",))
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), START)
    update = lambda grad, state, w: tx.update(grad, state, w, value_fn=counted)[1]
    step = jax.jit(jax.vmap(update))
    state, spent = jax.vmap(tx.init)(two), []
    for _ in range(4):
        spent.append(counted.spent(step, two, state, two))
        state = step(two, state, two)
    assert spent[0] > 0 and spent == [spent[0], 0, 0, spent[0]]


def test_a_rate_that_is_traced_is_sent_into_the_state():
    def run(rate):
        watch(optax.adam(rate), quantities=("sharpness_ratio",)).init(START)

    with pytest.raises(ValueError, match=r"make it by optax.inject_hyperparams"):
        jax.eval_shape(run, 0.1)


def test_parameters_in_half_precision():
    chex.clear_trace_counter()
    half = optax.tree.cast(START, jnp.bfloat16)
    tx = watch(optax.adam(0.01), every=1)
    step, state = stepper(tx), tx.init(half)
    params, state = step(half, state)
    after, later = step(params, state)
    assert after["a"].dtype == jnp.bfloat16
    of = rj.dynamics(optax.adam(0.01), loss)
    single = optax.tree.cast(params, jnp.float32)
    expected = rj.sharpness_ratio(of, rj.State.of(of, single, state.inner))
    found = report(later)["sharpness_ratio"]
    np.testing.assert_allclose(found, expected.value, rtol=0.05)


@pytest.mark.parametrize("name", ["lion", "muon", "MultiSteps", "prodigy"])
def test_no_ratio_where_linear_theory_has_none(name):
    optimizer = plain(OPTIMIZERS[name]())
    with pytest.warns(UserWarning, match="sharpness_ratio has no meaning"):
        tx = watch(optimizer)
        state = tx.init(START)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.init(START)  # Said once.
    found = report(state)
    assert "sharpness_ratio" not in found and "step_curvature" in found
    with pytest.raises(ValueError, match=r"no meaning for this optimizer: .{20}"):
        watch(optimizer, quantities=("sharpness_ratio",)).init(START)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"'sharpnes'.*sharpness_ratio"):
        watch(optax.sgd(0.1), quantities=("sharpnes",))
    with pytest.raises(ValueError, match="give by="):
        watch(optax.sgd(0.1), quantities=("share",))
    with pytest.raises(ValueError, match="oscillation needs a direction"):
        watch(optax.sgd(0.1), quantities=("oscillation",))
    with pytest.raises(ValueError, match="every=0"):
        watch(optax.sgd(0.1), every=0)
    three: Any = lambda path: 3
    with pytest.raises(ValueError, match=r"by must .*\['a'\].* 3"):
        watch(optax.sgd(0.1), by=three).init(START)


@pytest.mark.parametrize(
    ("quantity", "full_batch", "argument"),
    [
        ("realized_edge", False, "value_fn="),
        ("realized_edge", True, "value="),
        ("step_curvature", False, "value_fn="),
        ("sharpness_ratio", False, "probe_fn= or value_fn="),
        ("batch_sharpness", False, "value_fn="),
        ("noise_interaction", False, "probe_fn="),
    ],
)
def test_a_missing_input_is_named_when_it_is_first_missed(
    quantity, full_batch, argument
):
    tx = watch(optax.sgd(0.1), quantities=(quantity,), full_batch=full_batch)
    with pytest.raises(ValueError, match=f"watch needs {argument} for {quantity}"):
        jax.eval_shape(tx.update, START, tx.init(START), START)


def test_a_loop_that_gives_no_loss_is_told_so():
    tx = watch(optax.sgd(0.1))
    with pytest.raises(ValueError, match="watch needs value_fn="):
        tx.update(START, tx.init(START), START)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(START, tx.init(START), value_fn=loss)


def test_a_report_is_found_wherever_it_is():
    tx = watch(optax.sgd(0.1), quantities=("update_ratio",))
    chained = optax.chain(optax.clip(1.0), tx, optax.identity())
    parts: dict[Any, Any] = {"x": chained, "y": optax.sgd(0.1)}
    whole = optax.multi_transform(parts, {"a": "x", "b": "x"})
    state = {"opt": [whole.init(START)], "params": START}
    assert set(report(state)) == {"update_ratio", "status", "probed_at", "step"}
    with pytest.raises(ValueError, match="no watch"):
        report(optax.adam(0.1).init(START))
    with pytest.raises(ValueError, match="2 watches"):
        report((tx.init(START), tx.init(START)))


def test_a_report_of_what_a_checkpoint_gives_back():
    from flax.serialization import to_state_dict

    tx = watch(optax.adam(0.1))
    state = tx.init(START)
    assert report({"opt_state": to_state_dict(state)}).keys() == report(state).keys()


def test_a_report_inside_a_scan():
    tx = watch(optax.sgd(0.1), quantities=FREE, full_batch=True)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value)
        return (optax.apply_updates(params, updates), state), report(state)

    _, path = jax.lax.scan(step, (START, tx.init(START)), length=4)
    assert path["update_ratio"].shape == (4,)
    # The first step's is known when the loss after it is.
    assert np.isnan(path["realized_edge"]).tolist() == [True, False, False, False]


def test_a_step_has_the_derivative_that_it_has_without():
    def after(rate, wrap):
        tx = wrap(optax.inject_hyperparams(optax.adam)(0.1))
        state: Any = tx.init(START)
        getattr(state, "inner", state).hyperparams["learning_rate"] = rate
        grad, extra = jax.grad(loss)(START), {"value_fn": loss}
        extra = {} if wrap is plain else extra
        updates, _ = tx.update(grad, state, START, **extra)
        return loss(optax.apply_updates(START, updates))

    wrapped = lambda tx: watch(tx, every=1, quantities=(*LIGHT, "sharpness"))
    slopes = [jax.grad(after)(0.1, wrap) for wrap in (plain, wrapped)]
    np.testing.assert_allclose(*slopes, rtol=1e-12)


def test_a_state_can_be_donated():
    tx = watch(optax.sgd(0.1), quantities=("alternation", "sharpness"))
    update = lambda state: tx.update(START, state, START, value_fn=loss)[1]
    state = jax.jit(update, donate_argnums=0)(tx.init(START))
    assert int(report(state)["step"]) == 1


def test_a_loss_takes_its_other_arguments_by_name():
    tx = watch(optax.sgd(0.1), every=1, quantities=("step_curvature",))
    at = lambda shift: jax.grad(loss)(START, shift)
    numbers = []
    for extra in (
        {"value_fn": loss, "shift": 0.5},
        {"value_fn": partial(loss, shift=0.5)},
    ):
        _, state = tx.update(at(0.5), tx.init(START), START, **extra)
        numbers.append(float(report(state)["step_curvature"]))
    assert numbers[0] == numbers[1]
