"""Thresholds as they stand: schedules at a step, gradients that are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj

SPECTRUM = jnp.array([3.0, 1.0])
START = jnp.array([2.0, 4.0])
SIZE = float(jnp.linalg.norm(SPECTRUM * START))  # Of the gradient: 7.2
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 100, 1000)


def bowl(w):
    return 0.5 * jnp.sum(SPECTRUM * w**2)


def adam_of_one_counter(schedule, b1=0.9, b2=0.99):
    """Adam whose one counter both corrects the bias and reads the schedule."""

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        del params
        inner = optax.scale_by_adam(b1, b2)
        updates, new = inner.update(updates, state)
        return optax.tree.scale(-schedule(state.count), updates), new

    return optax.GradientTransformation(init, update)


# Name -> an optimizer of a schedule, and its threshold times the learning rate.
SCHEDULED = {
    "sgd": (optax.sgd, 2.0),
    "heavy ball": (lambda lr: optax.sgd(lr, momentum=0.9), 3.8),
    "adam": (optax.adam, 38.0),
    "adamw": (lambda lr: optax.adamw(lr, weight_decay=1e-9), 38.0),
    "injected": (optax.inject_hyperparams(optax.adam), 38.0),
    "rmsprop": (optax.rmsprop, 2.0),
    "chain": (lambda lr: optax.chain(optax.ema(0.9), optax.sgd(lr)), 38.0),
    "parted": (
        lambda lr: optax.partition({"a": optax.adam(lr)}, "a"),
        38.0,
    ),
}


# One of each kind; the others are slow.
QUICK = {"sgd", "injected", "parted"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in SCHEDULED
    ],
)
def test_reads_a_schedule_at_a_step(name):
    build, constant = SCHEDULED[name]
    flat = lambda w: bowl(w) * 1e-3  # Nothing clips here.
    system = rj.dynamics(build(WARMUP), flat)
    for step in (1, 50, 400):
        found = rj.threshold(system, START, step=step)
        np.testing.assert_allclose(found, constant / WARMUP(step), rtol=1e-5)
    assert jnp.isinf(rj.threshold(system, START))  # Where it ends the rate is zero.
    fixed = rj.dynamics(build(1e-2), flat)
    settled = rj.threshold(fixed, START)
    np.testing.assert_allclose(rj.threshold(fixed, START, step=7), settled, rtol=1e-6)


def test_a_counter_with_both_purposes_is_left_at_its_end():
    system = rj.dynamics(adam_of_one_counter(lambda count: 0.01), bowl)
    np.testing.assert_allclose(rj.threshold(system, START, step=3), 3800, rtol=1e-4)


CLIPPED = {
    "by global norm": (optax.clip_by_global_norm(1.0), [1 / SIZE, 1 / SIZE]),
    "by value": (optax.clip(5.0), [5 / 6, 1.0]),
    "not at all": (optax.clip_by_global_norm(100.0), [1.0, 1.0]),
    "scaled before": (
        optax.chain(optax.scale(2.0), optax.clip_by_global_norm(1.0)),
        [0.5 / SIZE, 0.5 / SIZE],
    ),
}
BASES = {
    "sgd": optax.sgd(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        (name, base)
        if base == "sgd" or (name, base) == ("by global norm", "adam")
        else pytest.param(name, base, marks=pytest.mark.slow)
        for name in CLIPPED
        for base in BASES
    ],
)
def test_clipping_raises_the_threshold(name, base):
    clip, share = CLIPPED[name]
    system = rj.dynamics(optax.chain(clip, BASES[base]), bowl)
    found = rj.threshold(system, START, step=5)
    settled = rj.threshold(system, START)
    np.testing.assert_allclose(found, settled / max(share), rtol=1e-4)
    state = system.update(system.init(START))
    plain = rj.coordinate_thresholds(system, state)
    grad = jax.grad(bowl)(START)
    shown = rj.coordinate_thresholds(system, state, grad=grad)
    np.testing.assert_allclose(plain / shown, share, rtol=1e-4)


def test_ratio_of_clipped_gradient_descent_is_that_of_its_step():
    """Along an eigenvector the step is shorter by as much as the ratio is lower."""
    start = jnp.array([4.0, 0.0])
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    system, plain = rj.dynamics(clipped, bowl), rj.dynamics(optax.sgd(0.5), bowl)
    free = rj.sharpness_ratio(plain, plain.init(start)).value
    ratio = rj.sharpness_ratio(system, system.init(start)).value
    np.testing.assert_allclose(free, 0.75, rtol=1e-8)
    np.testing.assert_allclose(ratio, 0.75 / 12, rtol=1e-6)
    # 2 x ratio is the step curvature ratio of the step that it takes.
    step = system.update(system.init(start)).params - start
    grad = jax.grad(bowl)(start)
    curved = step @ (SPECTRUM * step) / -(step @ grad)
    np.testing.assert_allclose(curved, 2 * ratio, rtol=1e-6)
    # Along a run it is taken where the optimizer is, not at the midpoint.
    run = rj.descend(system, start, 2, metrics=[rj.edge_of_stability(system)])
    np.testing.assert_allclose(run.metrics["sharpness_ratio"][0], 0.75 / 12, rtol=1e-6)


def test_refuses_a_negative_step():
    with pytest.raises(ValueError, match="step must be at least 0"):
        rj.threshold(rj.dynamics(optax.sgd(0.1), bowl), START, step=-1)


CLIPS = {
    "clip": (optax.chain(optax.clip(1.0), optax.adam(0.1)), True),
    "large": (optax.chain(optax.clip_by_global_norm(1e4), optax.adamw(0.1)), True),
    "adaptive": (optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)), True),
    "of a block": (optax.chain(optax.sgd(0.1), optax.clip_by_block_rms(1.0)), True),
    "sign": (optax.lion(0.1), True),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), False),
    "adamw": (optax.adamw(0.1), False),
    "nadam": (optax.nadam(0.1), False),
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), False),
    "adagrad": (optax.adagrad(0.1), False),
}


@pytest.mark.parametrize("name", CLIPS)
def test_what_may_clip_is_seen_in_a_few_steps(name):
    optimizer, clips = CLIPS[name]
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    loss = lambda w: jnp.sum(w["a"] ** 2) + jnp.sum(w["b"] ** 2)
    system = rj.dynamics(optimizer, loss)
    assert system.clips(params) is clips
    # Of shapes alone, under tracing too.
    said = []
    jax.jit(lambda w: said.append(system.clips(w)))(params)
    assert said == [clips]


NO_EDGE = {
    "lion": (optax.lion(0.1), "not linear in the gradient"),
    "sign": (optax.sign_sgd(0.1), "not linear in the gradient"),
    "muon": (optax.contrib.muon(0.1), "not linear in the gradient"),
    "prodigy": (optax.contrib.prodigy(), "not linear in the gradient"),
    "in turn": (optax.MultiSteps(optax.sgd(0.1), 3), "only every 3 steps"),
    "polyak": (optax.polyak_sgd(), "value of the loss"),
}


@pytest.mark.parametrize("name", NO_EDGE)
def test_where_there_is_no_threshold_it_is_said_why(name):
    optimizer, reason = NO_EDGE[name]
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    system = rj.dynamics(optimizer, lambda w: jnp.sum(w["a"] ** 2) + jnp.sum(w["b"]))
    assert reason in system.no_edge(params)


def test_a_ratio_without_a_threshold_warns():
    system = rj.dynamics(optax.lion(0.1), lambda w: jnp.sum(w**2))
    with pytest.warns(UserWarning, match="no meaning for this optimizer: its steps"):
        rj.sharpness_ratio(system, system.init(jnp.ones(2)))
    metrics = [rj.edge_of_stability(system)]
    with pytest.warns(UserWarning, match="no meaning for this optimizer: its steps"):
        rj.descend(system, jnp.ones(2), 2, metrics=metrics)
    plain = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(w**2))
    assert plain.no_edge(jnp.ones(2)) is None
