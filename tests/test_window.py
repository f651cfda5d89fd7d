"""Windows of a run: midpoints, alternation, warm-up, and how much it rings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.flows import ringing
from rodjax.optimizer import REACH, Window, alternating, alternating_multiplier

TIMES = np.arange(-REACH, REACH + 1.0)


def window_of(values):
    """A window whose parameters take these values, [7, ...]."""
    dynamics = rj.dynamics(optax.sgd(0.1), lambda w: jnp.sum(w**2))
    state = dynamics.init(jnp.asarray(values))
    return Window(state, jnp.zeros(()))


# c(t) = C + V t + A t^2 about the window's middle, and D of either sign.
C, V, A, D = np.array([[1.0, -2.0], [0.5, 0.25], [0.0, 3.0], [10.0, -7.0]])


def sequence(order):
    """A polynomial of this order in t, plus an alternation of constant size."""
    terms = (C, V, A)[: order + 1]
    smooth = sum(np.outer(TIMES**k, term) for k, term in enumerate(terms))
    return smooth + np.outer((-1.0) ** TIMES, D)


# Of c each takes its own average: what A t^2 and V t contribute is known.
COMBINATIONS = {
    # The weights 1/4 of t = -1 and 1.
    "midpoint": (rj.midpoint, lambda order: C + (order == 2) * A / 2),
    "half-step": (
        rj.half_step_midpoint,
        lambda order: C + (order > 0) * V / 2 + (order == 2) * A / 2,
    ),
    "alternating": (alternating, lambda order: D),
    "alternating 4": (lambda w: alternating(w, 4), lambda order: D),
    # A sixth difference of it vanishes, a second one does not.
    "alternating 2": (
        lambda w: alternating(w, 2),
        lambda order: D - (order == 2) * A / 2,
    ),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination_of_a_smooth_part_and_an_alternation(name, order):
    combine, truth = COMBINATIONS[name]
    got = combine(window_of(sequence(order))).params
    np.testing.assert_allclose(got, truth(order), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("order", [2, 4, 6])
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_alternating_suppresses_a_smooth_decay(order, rate):
    # 4 (sinh(r/2))^2 is the second difference of exp(-r t) over exp(-r t).
    window = window_of(np.exp(-rate * TIMES)[:, None])
    got = alternating(window, order).params[0]
    truth = (-1.0) ** (order // 2) * np.sinh(rate / 2) ** order
    np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-16)


def test_every_part_of_a_state_is_combined():
    dynamics = rj.dynamics(optax.adam(0.1), lambda w: jnp.sum(w**4))
    window = rj.warm_up(dynamics, jnp.array([1.0, -2.0]), steps=5)
    states = [window.at(k) for k in (-1, 0, 1)]
    truth = jax.tree.map(lambda x, y, z: (x + 2 * y + z) / 4, *states)
    middle = rj.midpoint(window)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-14), middle, truth
    )
    assert float(jax.tree.leaves(middle.clock)[0]) == 5.0
    single = Window(optax.tree.cast(window.states, jnp.float32), window.step)
    for leaf in jax.tree.leaves((rj.half_step_midpoint(single), alternating(single))):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("steps", [3, 4, 10])
@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1), optax.adam(0.1), optax.sgd(0.1, momentum=0.9)],
    ids=["sgd", "adam", "heavy ball"],
)
def test_warm_up_states_are_the_optimizers_iterates(steps, optimizer):
    loss = lambda p: jnp.sum(p["w"] ** 4) + p["b"] ** 2
    params = {"w": jnp.array([1.0, -0.5]), "b": jnp.array(2.0)}

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), w

    carry = (params, optimizer.init(params))
    iterates = jax.lax.scan(step, carry, length=steps + REACH + 1)[1]
    window = rj.warm_up(rj.dynamics(optimizer, loss), params, steps)
    assert float(window.step) == steps
    for name in params:
        np.testing.assert_allclose(
            window.states.params[name], iterates[name][steps - REACH :], rtol=1e-12
        )
    for clock in jax.tree.leaves(window.states.clock):
        np.testing.assert_array_equal(clock, steps + TIMES)


def test_before_the_first_step_iterates_are_extrapolated():
    dynamics = rj.dynamics(optax.adam, lambda w: jnp.sum(w**4))
    start = jnp.array([1.0, -2.0])
    window = rj.warm_up(dynamics, start, lr=0.1)
    zero, one = window.at(0), window.at(1)
    np.testing.assert_array_equal(zero.params, start)
    for k in range(1, REACH + 1):
        back = jax.tree.map(lambda z, o, k=k: z - k * (o - z), zero, one)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-14),
            window.at(-k),
            back,
        )
    np.testing.assert_allclose(rj.midpoint(window).params, start, rtol=1e-15)
    # One step later one of the extrapolated states has left the window.
    later = rj.warm_up(dynamics, start, 1, lr=0.1)
    np.testing.assert_allclose(later.at(-2).params, window.at(-1).params, rtol=1e-15)
    np.testing.assert_allclose(later.at(2).params, window.at(3).params, rtol=1e-14)


@pytest.mark.parametrize("more", range(1, 9))
def test_warming_up_further(more):
    """By as many steps as the window has states, and by others."""
    dynamics = rj.dynamics(optax.adam, lambda w: jnp.sum(w**4))
    start, lr = jnp.array([1.0, -2.0]), jnp.asarray(0.1)
    window = rj.warm_up(dynamics, start, 4, lr=lr)
    further = rj.warm_up(dynamics, window, more, lr=lr)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12)
    jax.tree.map(close, further, rj.warm_up(dynamics, start, 4 + more, lr=lr))


@pytest.mark.parametrize(
    ("steps", "lr", "message"),
    [(-1, 0.1, "steps must be at least 0, got -1"), (2, None, "lr is missing")],
)
def test_unfit_argument_is_named(steps, lr, message):
    dynamics = rj.dynamics(optax.sgd, lambda w: jnp.sum(w**2))
    with pytest.raises(ValueError, match=message):
        rj.warm_up(dynamics, jnp.ones(2), steps, lr=lr)


LR = 0.1


@jax.jit
def rung(beta, ratios):
    """Estimates and true amplitudes of the first of these modes, over its rotations."""
    curvature = (2 + 2 * beta) / LR * ratios
    dynamics = rj.dynamics(
        optax.sgd(LR, momentum=beta), lambda w: 0.5 * jnp.sum(curvature * w**2)
    )
    window = rj.warm_up(dynamics, jnp.ones(len(ratios)), 10)
    mu = alternating_multiplier(dynamics, window.at(0), ratios[0])

    def step(window, _):
        # w[t + k] = Re(a mu^k): two of them give the complex amplitude a.
        now, later = window.at(0).params[0], window.at(1).params[0]
        truth = jnp.hypot(now, (mu.real * now - later) / mu.imag)
        return rj.warm_up(dynamics, window, 1), (ringing(dynamics, window), truth)

    # Long enough for the phase to go round even close to the edge.
    return jax.lax.scan(step, window, length=60)[1]


def ringing_run(beta, ratio, others=()):
    """Of the mode at `ratio` of the threshold; `others` are further modes."""
    return rung(beta, jnp.array([ratio, *others]))


@pytest.mark.parametrize("others", [(), (0.05, 0.2)])
@pytest.mark.parametrize(
    ("beta", "ratio"), [(0.9, 0.5), (0.9, 0.8), (0.9, 0.95), (0.5, 0.9), (0.5, 0.95)]
)
def test_ringing_of_one_mode(beta, ratio, others):
    found, truth = ringing_run(beta, ratio, others=others)
    np.testing.assert_allclose(found.log_decay, 0.5 * np.log(beta), rtol=1e-12)
    seen = np.asarray(found.amplitude / truth)
    # The root mean square of an oscillation is its amplitude over sqrt 2.
    assert 0.65 < np.sqrt(np.mean(seen**2)) < 0.75
    assert seen.max() < 1.0


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_ringing_near_the_edge_does_not_depend_on_the_phase(beta):
    found, truth = ringing_run(beta, 0.95)
    assert float((found.amplitude / truth).min()) > 0.5


@pytest.mark.xfail(reason="d4^3 / d6^2 of a smooth decay is all of it", strict=True)
def test_a_smooth_decay_does_not_ring():
    # So slow that it is overdamped, and outlives the mode that rings.
    found, truth = ringing_run(0.5, 0.7, others=(0.01,))
    assert float((found.amplitude / truth).max()) < 2.0


@pytest.mark.parametrize("optimizer", [optax.sgd(LR), optax.rmsprop(LR)])
def test_nothing_rings_without_momentum(optimizer):
    dynamics = rj.dynamics(optimizer, lambda w: 5.0 * jnp.sum(w**2))
    found = ringing(dynamics, rj.warm_up(dynamics, jnp.ones(3), 5))
    assert float(found.amplitude) == 0.0 and float(found.log_decay) < 0


def test_ringing_shrinks_by_its_decay():
    # At half the threshold mu is purely imaginary: mu^4 has no phase.
    found, _ = ringing_run(0.9, 0.5)
    amplitude = np.asarray(found.amplitude)
    np.testing.assert_allclose(
        amplitude[4:] / amplitude[:-4], np.exp(4 * found.log_decay[0]), rtol=1e-6
    )
