"""Going on from what a training loop holds: states, windows, checkpoints."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import START, coupled, unchecked

import rodjax as rj
from rodjax.optimizer import merge

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 60)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))
ADAMW = rj.dynamics(OPTIMIZER, coupled)
OLD = 12


@jax.jit
def step(params, opt_state):
    grads = jax.grad(coupled)(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def trained(steps=OLD):
    """The pairs that a training loop went through, from the start on."""
    pairs = [(START, OPTIMIZER.init(START))]
    for _ in range(steps):
        pairs.append(step(*pairs[-1]))
    return pairs


PAIRS = trained(OLD + 8)
PARAMS, OPT_STATE = PAIRS[OLD]
window = rj.training.window


def same(a, b):
    """To the last bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def near(a, b):
    """Up to how a compiler rounds."""
    return all(
        np.allclose(x, y, rtol=1e-7, atol=0.0)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- states --------------------------------------------------------------------------


def test_a_state_is_split_and_put_together_again():
    state = rj.State.of(ADAMW, PARAMS, OPT_STATE)
    assert same(merge(state), (PARAMS, OPT_STATE))
    assert int(state.clock[1][1][0].count) == OLD


def test_counters_come_in_any_number():
    as_integers = jax.tree.map(
        lambda x: x.item() if x.dtype == jnp.int32 else x, OPT_STATE
    )
    as_floats = jax.tree.map(lambda x: jnp.asarray(x, float), OPT_STATE)
    for given in (as_integers, as_floats):
        state = rj.State.of(ADAMW, PARAMS, given)
        assert same(merge(state), (PARAMS, OPT_STATE))


def test_floats_are_cast_to_what_the_optimizer_keeps():
    half = jax.tree.map(
        lambda x: jnp.astype(x, jnp.float32) if x.dtype == float else x, OPT_STATE
    )
    state = rj.State.of(ADAMW, PARAMS, half)
    assert state.slow[1][1][0].nu["a"].dtype == float


def test_a_train_state_goes_on():
    train = TrainState.create(apply_fn=None, params=START, tx=OPTIMIZER)
    for _ in range(3):
        train = train.apply_gradients(grads=jax.grad(coupled)(train.params))
    start = window(ADAMW, train.params, train.opt_state, step=train.step)
    assert float(start.step) == 6.0
    # Its schedule is read in single precision, out of a compiled step in double.
    np.testing.assert_allclose(start.at(-3).params["a"], PAIRS[3][0]["a"], rtol=1e-7)


def test_an_optimizer_of_nnx_goes_on():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0), param_dtype=float)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    x = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    graph, params = nnx.split(model, nnx.Param)
    loss = lambda params: jnp.mean((nnx.merge(graph, params)(x) - 1.0) ** 2)
    iterates = []
    for _ in range(8):
        # A copy, for an update changes variables in place.
        iterates.append(jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)))
        if len(iterates) == 3:
            kept = iterates[-1], jax.tree.map(jnp.copy, optimizer.opt_state)
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
    dynamics = rj.dynamics(optax.adam(0.1), loss)
    start = window(dynamics, *kept, step=2)
    for ahead, params in enumerate(iterates[2:], -3):
        assert near(start.at(ahead).params, params)
    flow = rj.integrate(rj.flows.stable(dynamics), start, 2)
    assert np.isfinite(flow.metrics["loss"]).all()


# --- windows -------------------------------------------------------------------------


def test_one_state_begins_a_window():
    start = window(ADAMW, PARAMS, OPT_STATE, step=OLD)
    assert float(start.step) == OLD + 3
    assert same(merge(start.at(-3)), (PARAMS, OPT_STATE))


def test_the_states_before_are_kept():
    before = iter(PAIRS[:OLD])
    start = window(ADAMW, PARAMS, OPT_STATE, step=OLD, before=before)
    assert float(start.step) == OLD
    for back in range(4):
        assert same(merge(start.at(-back)), PAIRS[OLD - back])
    some = window(ADAMW, PARAMS, OPT_STATE, step=OLD, before=PAIRS[OLD - 1 : OLD])
    assert float(some.step) == OLD + 2 and same(some.at(-2).params, PARAMS)


def test_of_an_iterator_only_the_last_states_are_held():
    held = []

    def pairs():
        for pair in PAIRS[:OLD]:
            held.append(1)
            yield pair

    before = pairs()
    window(ADAMW, PARAMS, OPT_STATE, step=OLD, before=before)
    assert len(held) == OLD


def test_a_run_goes_on_from_its_checkpoint():
    whole = rj.descend(ADAMW, START, OLD + 8)
    state = rj.descend(ADAMW, START, OLD).final.at(0)
    params, opt_state = merge(state)
    rest = rj.descend(ADAMW, window(ADAMW, params, opt_state, step=OLD), 5)
    assert rest.steps.tolist() == list(range(OLD + 3, OLD + 9))
    assert same(rest.params, jax.tree.map(lambda x: x[OLD + 3 :], whole.params))
    assert same(rest.ends, jax.tree.map(lambda x: x[OLD + 3 :], whole.ends))


def test_a_run_goes_on_as_the_training_loop_did():
    rest = rj.descend(ADAMW, window(ADAMW, PARAMS, OPT_STATE, step=OLD), 5)
    for index, (params, _) in enumerate(PAIRS[OLD + 3 : OLD + 9]):
        assert near(jax.tree.map(lambda x, i=index: x[i, 0], rest.ends), params)


def test_parameters_alone_restart_the_schedule():
    again = rj.descend(ADAMW, PARAMS, 1)
    went_on = rj.descend(ADAMW, window(ADAMW, PARAMS, OPT_STATE, step=OLD), 1)
    # The warm-up begins at zero.
    assert same(jax.tree.map(lambda x: x[0, 1], again.ends), PARAMS)
    assert int(again.final.at(0).clock[1][1][0].count) == 1
    assert int(went_on.final.at(0).clock[1][1][0].count) == OLD + 4


def test_a_learning_rate_is_that_of_the_run():
    dynamics = rj.dynamics(optax.adam, coupled)
    opt_state = optax.adam(0.1).init(START)
    start = window(dynamics, START, opt_state, step=0, lr=0.1)
    path = rj.descend(dynamics, START, 3, lr=0.1)
    assert near(start.at(0).params, jax.tree.map(lambda x: x[3, 0], path.ends))
    with pytest.raises(ValueError, match="lr is missing"):
        window(dynamics, START, opt_state, step=0)


# --- with watch around the optimizer ------------------------------------------------


def test_watch_is_taken_off_wherever_it_is(tmp_path):
    watch = partial(rj.training.watch, every=2, quantities=("update_ratio",))
    inside = optax.chain(optax.clip_by_global_norm(1.0), watch(optax.adamw(SCHEDULE)))
    for optimizer in (watch(OPTIMIZER), inside, watch(inside)):
        params, opt_state = START, optimizer.init(START)
        for _ in range(3):
            grads = jax.grad(coupled)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        start = window(ADAMW, params, opt_state, step=3)
        assert near(merge(start.at(-3)), PAIRS[3])
        with pytest.raises(ValueError, match=r"watch around it.*optimizer inside"):
            window(rj.dynamics(optimizer, coupled), params, opt_state, step=3)
    # As the dicts that a file has in its place, too.
    tree = {"params": params, "opt_state": opt_state}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
    handler = ocp.PyTreeCheckpointHandler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = handler.restore(tmp_path / "run" / "3" / "default")
    again = window(ADAMW, plain["params"], plain["opt_state"], step=3)
    assert same(again.states, start.states)
    (one,) = rj.training.checkpoints(tmp_path / "run", tree)
    assert same(one.opt_state, opt_state)


# --- checkpoints ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of steps 9 to 12 as one tree, and one that was not finished."""
    path = tmp_path_factory.mktemp("run") / "checkpoints"
    with ocp.CheckpointManager(path) as manager:
        for at in (12, 9, 10, 11):
            params, opt_state = PAIRS[at]
            tree = {"params": params, "opt_state": opt_state, "seed": jnp.array(7)}
            manager.save(at, args=ocp.args.StandardSave(tree), force=True)
    (path / "13.orbax-checkpoint-tmp-1" / "default").mkdir(parents=True)
    (path / "notes").mkdir()
    return path


TEMPLATE = {"params": START, "opt_state": OPTIMIZER.init(START)}


def test_checkpoints_come_back_as_they_were(folder):
    found = list(rj.training.checkpoints(folder, TEMPLATE))
    assert [one.step for one in found] == [9, 10, 11, 12]
    for one in found:
        assert same((one.params, one.opt_state), PAIRS[one.step])


def test_checkpoints_make_a_window(folder):
    *before, last = rj.training.checkpoints(folder, TEMPLATE, steps=range(9, 13))
    pairs = [(one.params, one.opt_state) for one in before]
    start = window(ADAMW, last.params, last.opt_state, step=last.step, before=pairs)
    assert float(start.step) == 12.0
    assert same(merge(start.at(-3)), PAIRS[9])


def test_shapes_serve_as_a_template(folder):
    shapes = jax.eval_shape(lambda: TEMPLATE)
    (one,) = rj.training.checkpoints(str(folder), shapes, steps={10})
    assert same((one.params, one.opt_state), PAIRS[10])


def test_a_train_state_in_named_parts_comes_back(tmp_path):
    train = TrainState.create(apply_fn=None, params=PARAMS, tx=OPTIMIZER)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ocp.CheckpointManagerOptions(
        step_prefix="run", step_format_fixed_length=6
    )
    with ocp.CheckpointManager(whole) as manager:
        manager.save(3, args=ocp.args.StandardSave(train))
    with ocp.CheckpointManager(parts, options=options) as manager:
        items = {name: getattr(train, name) for name in ("params", "opt_state")}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(3, args=ocp.args.Composite(**args))
    for path, template in ((whole, train), (parts, items), (whole, items)):
        (one,) = rj.training.checkpoints(path, template)
        assert one.step == 3
        assert same((one.params, one.opt_state), (train.params, train.opt_state))


def test_nnx_is_read_by_its_own_names(tmp_path):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    saved = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.StandardSave(saved))
    pick = lambda tree: (tree["model"], tree["optimizer"]["opt_state"])
    (one,) = rj.training.checkpoints(tmp_path / "run", saved, pick=pick)
    assert same(one.params, nnx.state(model))
    loss = lambda params: jnp.sum(params["kernel"][...] ** 2)
    start = window(
        rj.dynamics(optax.adam(0.1), loss), one.params, one.opt_state, step=one.step
    )
    assert float(start.step) == 8.0


def test_dicts_of_a_file_make_a_state(folder):
    """What orbax gives back where nobody says what it was."""
    handler = ocp.PyTreeCheckpointHandler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = handler.restore(folder / "12" / "default")
    assert isinstance(plain["opt_state"], list)
    state = rj.State.of(ADAMW, plain["params"], plain["opt_state"])
    assert same(merge(state), PAIRS[12])


def test_directories_without_checkpoints_are_refused(folder, tmp_path):
    read = rj.training.checkpoints
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        read(tmp_path / "nowhere", TEMPLATE)
    with pytest.raises(ValueError, match="no finished checkpoint"):
        read(tmp_path, TEMPLATE)
    with pytest.raises(ValueError, match=r"of those steps, only of 9, 10, 11, 12"):
        read(folder, TEMPLATE, steps=range(20, 30))
    with pytest.raises(ValueError, match=r"opt_state.*pick="):
        read(folder, {"params": START})


def test_checkpoints_of_another_model_name_the_leaf(folder):
    wide = {"a": jnp.ones(4), "b": jnp.array(1.0)}
    more = START | {"c": jnp.array(1.0)}
    for params, optimizer, message in (
        (wide, OPTIMIZER, r"checkpoint 9\['.*'\].*\['a'\] has shape \(3,\).*\(4,\)"),
        (
            more,
            OPTIMIZER,
            r"checkpoint 9 has no leaf .*\['c'\], which the template has",
        ),
        (START, optax.adamw(SCHEDULE), r"checkpoint 9 has no leaf \['opt_state'\]"),
    ):
        template = {"params": params, "opt_state": optimizer.init(params)}
        found = rj.training.checkpoints(folder, template)
        with pytest.raises(ValueError, match=message):
            next(found)


# --- refusals ------------------------------------------------------------------------


def test_states_of_something_else_name_the_leaf():
    sgd = optax.sgd(0.1, momentum=0.9)
    wrong = jax.tree.map(lambda x: x, OPT_STATE)
    wide = jax.tree.map(lambda x: jnp.ones(4) if x.shape == (3,) else x, OPT_STATE)
    for given, message in (
        ((), r"no leaf \[1\]\[0\]\.count, which this optimizer has; it has none"),
        (sgd.init(START), r"no leaf \[1\]\[0\]\.count.*\[0\]\.trace\['a'\]"),
        ((*wrong, sgd.init(START)), r"has a leaf \[2\]\[0\]\.trace"),
        (wide, r"opt_state\[1\]\[0\]\.mu\['a'\] has shape \(4,\).*\(3,\)"),
        (
            jax.tree.map(lambda x: x > 0 if x.ndim else x, OPT_STATE),
            r"opt_state\[1\]\[0\]\.mu\['a'\] has dtype bool.*float64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rj.State.of(ADAMW, PARAMS, given)
        with pytest.raises(ValueError, match=message):
            window(ADAMW, PARAMS, given, step=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad):
    params = PARAMS | {"a": PARAMS["a"].at[1].set(bad)}
    with pytest.raises(ValueError, match=r"params\['a'\] is not finite in 1 of its 3"):
        window(ADAMW, params, OPT_STATE, step=OLD)
    clip, (adam, *rest) = OPT_STATE
    nu = adam.nu | {"b": jnp.array(bad)}
    opt_state = clip, (adam._replace(nu=nu), *rest)
    with pytest.raises(
        ValueError, match=r"opt_state\[1\]\[0\]\.nu\['b'\] is not finite"
    ):
        window(ADAMW, PARAMS, opt_state, step=OLD)
    before = [(PARAMS, opt_state)]
    with pytest.raises(ValueError, match=r"before\[-1\]: opt_state.*not finite"):
        window(ADAMW, PARAMS, OPT_STATE, step=OLD, before=before)


def test_states_must_follow_each_other():
    with pytest.raises(ValueError, match=r"consecutive.*count goes from 4 to 12"):
        window(ADAMW, PARAMS, OPT_STATE, step=OLD, before=[PAIRS[4]])
    with pytest.raises(ValueError, match="at least 0"):
        window(ADAMW, PARAMS, OPT_STATE, step=-1)
    with unchecked(), pytest.raises(ValueError, match="states is empty"):
        rj.Window.of(ADAMW, [], step=0)


def test_a_loss_of_more_than_the_parameters_is_refused():
    of_key = rj.dynamics(OPTIMIZER, lambda params, key: coupled(params))
    with pytest.raises(TypeError, match=r"more than the parameters.*'key'.*full-batch"):
        rj.descend(of_key, START, 1)
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    dropped = lambda params: coupled(params) + jnp.sum(model(params["a"]))
    with pytest.raises(ValueError, match=r"dropout.*full-batch"):
        rj.descend(rj.dynamics(OPTIMIZER, dropped), START, 1)


def test_a_loss_that_draws_at_random_is_refused():
    rng = np.random.default_rng(0)
    noisy = rj.dynamics(OPTIMIZER, lambda p: coupled(p) + rng.normal() * p["b"])
    with pytest.raises(ValueError, match=r"draws at random.*full-batch"):
        window(noisy, PARAMS, OPT_STATE, step=OLD)
