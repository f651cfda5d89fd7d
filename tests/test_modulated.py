"""The modulated flow: its split is exact, its growth and onset are the optimizer's."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import EULER, lane, walk

import rodjax as rj
from rodjax.flows import modulated, shift
from rodjax.transforms import scalar_adam, scalar_nadam, scalar_rmsprop

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(0.01),
    "adam": optax.adam(0.01),
    "nadam": optax.nadam(0.01),
    "scalar_rmsprop": scalar_rmsprop(0.01),
    "scalar_adam": scalar_adam(0.01),
    "scalar_nadam": scalar_nadam(0.01),
    "adamw": optax.adamw(0.01),
    "lion": optax.lion(0.01),
    "yogi": optax.yogi(0.01),
    "amsgrad": optax.amsgrad(0.01),
    "radam": optax.radam(0.01),
    "adabelief": optax.adabelief(0.01),
}
KEY = jax.random.key(0)
same = partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-14)


def quartic(params):
    """Smooth, coupled, not quadratic."""
    a, b = params["a"], params["b"]
    return 1.5 * a @ a + jnp.cosh(jnp.sum(a) - b) + 0.2 * b**4


START = {"a": jnp.array([0.8, -0.6]), "b": jnp.array(1.1)}


def begun(flow, start, lr=None):
    """The state at a start."""
    return jax.jit(partial(flow.init, key=KEY))(start, lr=lr)


def ends_of(flow, path):
    """The two ends at every step of a path."""
    return jax.vmap(lambda y: flow.observe(y, lr=None)[0])(path)


# Of Lion, whose steps go by a sign, a ratio to the threshold has no meaning.
@pytest.mark.filterwarnings("ignore:a ratio to the stability threshold")
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("adam", "momentum")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_split_is_exact(name):
    """A unit Euler step moves c + delta to c1 - delta1 as the optimizer would."""
    dynamics = rj.dynamics(OPTIMIZERS[name], quartic)
    flow = modulated(dynamics, degree=1, floor=0.0)

    @jax.jit
    def step(y):
        y1 = jax.tree.map(jnp.add, y, flow.vector_field(0.0, y, None))
        both = []
        for side in (1.0, -1.0):
            jumped = dynamics.update(shift(y.mean, y.delta, side))
            both.append((shift(y1.mean, y1.delta, -side), jumped))
        return both

    y = begun(flow, rj.warm_up(dynamics, START, steps=9))
    noise = optax.tree.random_like(KEY, y.delta)
    assert bool(jnp.isfinite(y.memory))
    # The push up to what momentum still carries is no part of the split.
    y = y._replace(delta=optax.tree.scale(0.02, noise), memory=jnp.zeros(()))
    (up, jumped_up), (down, jumped_down) = step(y)
    same(up.phase, jumped_up.phase)
    same(down.phase, jumped_down.phase)
    # What does not alternate moves by the mean of the two, and the clock by one.
    mean = lambda a, b: 0.5 * (a + b)
    same(up.slow, jax.tree.map(mean, jumped_up.slow, jumped_down.slow))
    same(up.clock, jumped_up.clock)


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_unit_steps_are_the_run(name):
    dynamics = rj.dynamics(OPTIMIZERS[name], quartic)
    flow = modulated(dynamics, degree=1, floor=0.0)
    begin = rj.warm_up(dynamics, START, steps=4)
    y = begun(flow, begin)
    same(shift(y.mean, y.delta), dynamics.fluid(begin.at(0)))
    # So does every other split of the same iterate, as one with a larger delta.
    more = optax.tree.scale(0.02, optax.tree.random_like(KEY, y.delta))
    y = y._replace(
        mean=shift(y.mean, more, -1.0),
        delta=optax.tree.add(y.delta, more),
        memory=jnp.zeros(()),
    )
    path = jax.jit(lambda y: walk(flow, y, 20, method=EULER, substeps=1))(y)
    ends = ends_of(flow, path)
    run = rj.descend(dynamics, begin, steps=20)
    for t in range(21):
        near = partial(chex.assert_trees_all_close, rtol=1e-10)
        near(lane(ends, (t, t % 2)), lane(run.ends, (t, 0)))


SLOPE = jnp.array([4.0, 1.5, 0.5])
bowl = lambda w: 0.5 * w @ (SLOPE * w)
BOWL = rj.dynamics(optax.sgd, bowl)
ONES = jnp.ones(3)


@partial(jax.jit, static_argnames=("degree", "steps", "substeps"))
def plucked(start, lr, degree, steps, substeps):
    """From ones and with this delta: centres, and deltas along the sharpest."""
    flow = modulated(BOWL, degree=degree, floor=0.0)
    y = flow.init(ONES, lr=lr, key=KEY)
    y = y._replace(delta=(start, *y.delta[1:]))
    path = walk(flow, y, steps, lr=lr, substeps=substeps)
    return path.mean.params, path.delta[0][:, 0]


def test_quadratic_in_closed_form():
    """Plain: c' = -eta H c and delta' = (eta H - 2) delta, each by itself."""
    lr, t = 0.2, np.arange(7.0)
    centre, delta = plucked(jnp.array([0.1, 0.0, 0.0]), lr, 1, 6, 64)
    np.testing.assert_allclose(centre, np.exp(-lr * np.outer(t, SLOPE)), rtol=4e-4)
    exact = 0.1 * np.exp((lr * 4.0 - 2.0) * t)
    np.testing.assert_allclose(delta, exact, rtol=2e-3)


def grown(degree, product):
    """By what delta grows in a step at this eta lambda."""
    delta = plucked(jnp.array([1e-3, 0.0, 0.0]), product / 4.0, degree, 6, 64)[1]
    return np.asarray(delta[1:] / delta[:-1])


@pytest.mark.parametrize("product", [2.05, 2.2, 2.4, 2.6])
def test_growth_is_exact(product):
    exact = product - 1.0
    for degree in (2, 3):
        np.testing.assert_allclose(grown(degree, product), exact, rtol=1e-3)
    # Uncorrected, delta grows by exp(exact - 1).
    np.testing.assert_allclose(grown(1, product), np.exp(exact - 1.0), rtol=1e-3)


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("product", [1.0, 1.5, 1.9])
def test_decays_below_the_threshold(product, degree):
    assert np.all(grown(degree, product) < 1.0)
    if product > 1.8:  # as exactly as above, not far from the threshold
        np.testing.assert_allclose(grown(degree, product), product - 1.0, rtol=1e-3)


@pytest.mark.parametrize("product", [2.0, 2.5, 3.0])
def test_third_degree_is_not_too_stiff_for_heun(product):
    """What grows along delta contracts in c, and by 4 substeps of Heun it does."""
    flow = modulated(BOWL, degree=3, floor=0.0)
    lr = jnp.asarray(product / 4.0)
    y = flow.init(ONES, lr=lr, key=KEY)
    delta = jnp.array([1e-9, 0.0, 0.0])
    path = walk(flow, y._replace(delta=(delta, *y.delta[1:])), 5, lr=lr, substeps=4)
    steps = np.abs(path.mean.params[:, 0])
    assert np.all(steps[1:] < 0.9 * steps[:-1])


def test_degrees_that_there_are():
    with pytest.raises(ValueError, match="degree must be 1, 2 or 3, got 4"):
        modulated(BOWL, degree=4)


@jax.jit
def floored(floor):
    """Size of delta and of the centre along the bowl, the floor being data."""
    flow = modulated(BOWL, floor=lambda lr: floor)
    y = flow.init(ONES, lr=jnp.asarray(0.3), key=KEY)
    path = walk(flow, y, 15, lr=0.3, substeps=8)
    norm = partial(jnp.linalg.norm, axis=1)
    return norm(path.delta[0]), norm(path.mean.params)


@pytest.mark.parametrize("floor", [1e-9, 1e-6])
def test_floor_is_the_least_delta(floor):
    size, norm = floored(floor)
    np.testing.assert_allclose(size[0], floor * norm[0], rtol=1e-6)
    assert np.all(size > 0.2 * floor * norm) and np.all(size < 5 * floor * norm)


def test_without_a_floor_there_is_no_delta():
    size, norm = floored(0.0)
    # To rounding: compiled together, the two ends may be rounded differently.
    assert np.all(size < 1e-15 * norm[0])
    flow, lr = modulated(BOWL, floor=0.0), jnp.asarray(0.3)
    y = flow.init(ONES, lr=lr, key=KEY)
    with jax.disable_jit():
        field = flow.vector_field(0.0, y, lr)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(field.delta))


def test_default_floor_is_what_rounding_gives_one_direction():
    for n in (4, 900):
        dynamics = rj.dynamics(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2))
        y = modulated(dynamics).init(jnp.ones(n), lr=None, key=KEY)
        share = (
            float(optax.tree.norm(y.delta[0])) / n**0.5 / float(jnp.finfo(float).eps)
        )
        np.testing.assert_allclose(share, 1.0 if n == 4 else 0.1, rtol=1e-10)


@pytest.mark.parametrize("size", [1e-10, 1e-7, 1e-4])
def test_small_delta_is_not_lost_among_rounding_errors(size):
    """The plain field is (eta H - 2) delta where c + delta = c in float32, too."""
    slope = jnp.linspace(0.5, 4.0, 100, dtype="float32")
    dynamics = rj.dynamics(optax.sgd, lambda w: 0.5 * w @ (slope * w))
    flow = modulated(dynamics, degree=1, floor=0.0)
    lr = jnp.asarray(0.5, "float32")
    y = flow.init(jnp.ones(100, "float32"), lr=lr, key=KEY)
    delta = size * jax.random.normal(KEY, (100,), "float32")
    field = flow.vector_field(0.0, y._replace(delta=(delta, *y.delta[1:])), lr)
    truth = (lr * slope - 2.0) * delta
    assert jnp.linalg.norm(field.delta[0] - truth) < 0.1 * jnp.linalg.norm(lr * delta)


ETA = 0.3
VALLEY = rj.problems.berthier(initial=(0.0, 5.0))
SGD = rj.dynamics(optax.sgd(ETA), VALLEY.loss)


@pytest.fixture(scope="module")
def risen():
    """floor -> height and size of delta along 1200 steps."""

    def solve(floor):
        flow = modulated(SGD, floor=floor)
        path = jax.jit(lambda y: walk(flow, y, 1200))(begun(flow, VALLEY.params))
        size = jax.vmap(optax.tree.norm)(path.delta[0])
        return np.asarray(path.mean.params["y"]), np.asarray(size)

    return {floor: solve(floor) for floor in (None, 1e-8, 1e-4)}


def test_roundoff_settles_at_the_edge(risen):
    y, _ = risen[None]
    assert abs(y[-1] * ETA / 2 - 1) < 0.03
    assert abs(y[-300:].mean() * ETA / 2 - 1) < 0.03


def test_larger_floor_is_earlier(risen):
    # The first step at which the oscillation is as large as it will stay.
    ends = [int(np.argmax(size > 0.1)) for _, size in risen.values()]
    assert 0 < ends[2] < ends[1] - 10 < ends[0] - 20


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_no_gradient_no_nan(name):
    """A parameter that the loss ignores has a second moment of zero for ever."""
    half = lambda params: 0.5 * params["used"] ** 2
    flow = modulated(rj.dynamics(OPTIMIZERS[name], half))
    start = {"used": jnp.array(1.0), "idle": jnp.array([1.0, -2.0])}
    path = jax.jit(lambda y: walk(flow, y, 5))(begun(flow, start))
    chex.assert_tree_all_finite(path)
    assert 0.5 < float(path.mean.params["used"][-1]) < 0.99
    # Still, but for a floor that is pushed out and pulled in at random.
    drift = path.mean.params["idle"] - start["idle"][None]
    assert float(jnp.max(jnp.abs(drift))) < 1e-10
