"""Sweeps against single runs, lane by lane, in every way of chunking them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.sweeps import _program as program

STEPS, START, EVERY = 40, 4, 4


def loss(w):
    """Two coupled wells; gradient descent diverges beyond a learning rate of 2."""
    return 0.5 * w[0] ** 2 + 0.25 * w[1] ** 4 + 0.1 * w[0] * w[1] - 0.3 * w[1]


def draw(key):
    return 0.5 * jax.random.normal(key, (2,))


heavy = rj.dynamics(lambda h: optax.sgd(h["lr"], momentum=h["momentum"]), loss)
FLOWS = {
    "rod": rj.flows.rod(heavy),
    "modulated": rj.flows.modulated(heavy),
}
METRICS = (rj.edge_of_stability(heavy),)
GRID = {"lr": [0.1, 1.0, 3.0], "momentum": [0.2, 0.6], "seed": [0, 4]}
COMMON = {"flows": FLOWS, "metrics": METRICS, "start": START, "every": EVERY}


def keep_first(w):
    return {"first": w[:1]}


@pytest.fixture(scope="module")
def swept():
    return rj.sweep(heavy, draw, STEPS, grid=GRID, keep=keep_first, **COMMON)


def single(lr, momentum, seed, steps=STEPS, start=START):
    """The run and the comparisons of one lane, computed alone."""
    h, params = {"lr": lr, "momentum": momentum}, draw(jax.random.key(seed))
    window = rj.warm_up(heavy, params, start, lr=h)
    settings = {"lr": h, "every": EVERY, "metrics": METRICS}
    run = rj.descend(heavy, window, steps, **settings)
    key = jax.random.key(seed)
    paths = {
        name: rj.integrate(flow, window, steps, key=key, **settings)
        for name, flow in FLOWS.items()
    }
    return run, paths


@pytest.mark.parametrize(
    ("lr", "momentum", "seed"), list(itertools.product(*GRID.values())), ids=str
)
def test_every_lane_is_as_if_alone(swept, lr, momentum, seed):
    run, paths = single(lr, momentum, seed)
    lane = swept.sel(lr=lr, momentum=momentum, seed=seed)
    near = {"rtol": 1e-7, "atol": 1e-9}
    for name, values in run.metrics.items():
        np.testing.assert_allclose(lane[name].sel(flow="run"), values, **near)
    first = lane["params.first"]
    np.testing.assert_allclose(first.sel(flow="run"), run.params[:, :1], **near)
    for flow, path in paths.items():
        found, comparison = lane.sel(flow=flow), rj.compare(path, run)
        for name, values in path.metrics.items():
            np.testing.assert_allclose(found[name], values, **near)
        np.testing.assert_allclose(found.distance, comparison.distance, **near)
        np.testing.assert_allclose(found["params.first"], path.params[:, :1], **near)
        summary = comparison.summary()
        assert found.evaluations == summary.pop("update_evaluations")
        for name, value in summary.items():
            np.testing.assert_allclose(found[name], value, **near)


def test_lanes_that_diverge_are_marked_and_leave_the_others_finite(swept):
    at = swept.diverged_at.sel(flow="run")
    assert np.isfinite(at.sel(lr=3.0)).all() and np.isnan(at.sel(lr=[0.1, 1.0])).all()
    alive = swept.sel(lr=[0.1, 1.0])
    for name in ("loss", "distance", "sharpness_ratio", "final_distance"):
        assert np.isfinite(alive[name]).all()
    assert np.isnan(swept.loss.sel(lr=3.0, flow="run").isel(step=-1)).all()


def test_coordinates_and_attributes(swept):
    assert swept.distance.dims == ("flow", "lr", "momentum", "seed", "step")
    assert swept.diverged_at.dims == ("flow", "lr", "momentum", "seed")
    assert swept.flow.values.tolist() == ["run", "rod", "modulated"]
    assert swept.step.values.tolist() == list(range(START, START + STEPS + 1, EVERY))
    assert {name: swept[name].values.tolist() for name in GRID} == GRID
    assert swept["params.first"].sizes["params.first_0"] == 1
    assert swept.attrs["solver"] == "Heun" and swept.attrs["start"] == START


def same(found, expected):
    assert list(found) == list(expected) and found.attrs == expected.attrs
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-9)


def test_one_compilation_for_any_grid_and_chunks_that_do_not_divide_it(swept):
    settings = {"lane_chunk": 5, "time_chunk": 12, "keep": keep_first, **COMMON}
    same(rj.sweep(heavy, draw, STEPS, grid=GRID, **settings), swept)
    before = program.build.cache_info().misses
    with jax.checking_leaks(), counted_compilations() as compiled:
        other = {"lr": [0.2, 0.3, 0.5], "momentum": 0.1, "seed": [0]}
        first = rj.sweep(heavy, draw, 2 * STEPS, grid=other, **settings)
        rj.sweep(heavy, draw, 16, grid=GRID | {"seed": range(9)}, **settings)
    assert program.build.cache_info().misses == before and compiled == []
    assert first.momentum == 0.1 and first.momentum.dims == ()


class counted_compilations:
    """The names of the functions compiled inside the block."""

    def __enter__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        return self.names

    def listen(self, event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            self.names.append(about)

    def __exit__(self, *_):
        jax.monitoring.clear_event_listeners()


def test_memory_bounds_the_chunk(monkeypatch):
    sizes, build = [], program.build

    def watched(*arguments):
        sizes.append(build(*arguments))
        return sizes[-1]

    monkeypatch.setattr(program, "build", watched)
    expected = rj.sweep(heavy, draw, STEPS, grid=GRID, every=EVERY)
    whole = sizes.pop()
    assert whole.lanes == 12
    room = 0.5 * whole.bytes
    monkeypatch.setattr(program, "memory", lambda devices: room / program.SHARE)
    small = rj.sweep(heavy, draw, STEPS, grid=GRID, every=EVERY)
    assert sizes[-1].bytes <= room and 1 < sizes[-1].lanes < 12
    same(small, expected)


def test_a_lane_lost_before_the_start_has_no_flows():
    grid = {"lr": [0.5, 30.0], "momentum": 0.0, "seed": 1}
    flows = {"modulated": FLOWS["modulated"]}
    data = rj.sweep(heavy, draw, 4, grid=grid, flows=flows, start=20)
    step = 0
    params, h = draw(jax.random.key(1)), {"lr": 30.0, "momentum": 0.0}
    state = heavy.init(params, lr=h)
    while np.all(np.isfinite(state.params)):
        state, step = heavy.update(state, h), step + 1
    assert step < 20
    assert data.diverged_at.sel(lr=30.0).values.tolist() == [step] * 2
    assert data.evaluations.sel(lr=30.0).values.tolist() == [0] * 2
    assert np.isnan(data.loss.sel(lr=30.0)).all()
    assert np.isfinite(data.loss.sel(lr=0.5)).all()
    assert np.isnan(data.final_distance.sel(lr=30.0)).all()


@pytest.mark.slow
def test_zipped_axes_and_the_amplitude_of_the_seed():
    seeded = rj.flows.modulated(heavy, seed=lambda h: h["seed_amplitude"])
    grid = {
        ("lr", "momentum"): ([0.3, 1.2], [0.6, 0.1]),
        "seed_amplitude": [0.0, 1e-3, 1e-2],
    }
    start = jnp.array([0.3, 0.5])
    settings = {"every": 2, "start": 3}
    data = rj.sweep(heavy, start, 8, grid=grid, flows={"m": seeded}, **settings)
    assert data.distance.dims == ("flow", "lr", "seed_amplitude", "step")
    assert data.momentum.dims == ("lr",)
    assert data.momentum.sel(lr=1.2) == 0.1
    h = {"lr": 1.2, "momentum": 0.1}
    window = rj.warm_up(heavy, start, 3, lr=h)
    flow = rj.flows.modulated(heavy, seed=1e-3)
    path = rj.integrate(flow, window, 8, lr=h, every=2)
    lane = data.sel(lr=1.2, flow="m", seed_amplitude=1e-3)
    np.testing.assert_allclose(lane.amplitude, path.metrics["amplitude"], rtol=1e-9)
    sizes = data.amplitude.sel(flow="m", lr=1.2).isel(step=-1).values
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("name", ["edge", "covariance"])
def test_other_flows_take_the_amplitude_of_the_seed_too(name):
    sgd = rj.dynamics(lambda h: optax.sgd(h["lr"]), loss)
    build = getattr(rj.flows, name)
    fixed, swept = build(sgd, seed=1e-3), build(sgd, seed=lambda h: h["amplitude"])
    h, start = {"lr": 1.0, "amplitude": 1e-3}, jnp.array([0.3, 0.5])
    y = fixed.init(start, lr=h, key=jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, y, swept.init(start, lr=h, key=jax.random.key(0))
    )
    smaller = swept.init(start, lr=h | {"amplitude": 1e-4}, key=jax.random.key(0))
    ends = [flow.observe(y, lr=h)[0] for flow, y in [(fixed, y), (swept, smaller)]]
    spread = [float(jnp.ptp(end[:, 0])) for end in ends]
    assert spread[0] == pytest.approx(10 * spread[1], rel=1e-6)


def test_no_lane_waits_for_one_that_is_lost():
    """A metric whose iterations grow with the parameters, which are huge in the end."""
    sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    seen = []

    def update(snapshot, carry, lr):
        size = jnp.max(jnp.abs(snapshot.centre.params))

        def halve(carry):
            size, count = carry
            return size / 2, count + 1

        _, count = jax.lax.while_loop(lambda c: c[0] > 1e30, halve, (size, 0.0))
        jax.debug.callback(lambda count: seen.append(float(count)), count)
        return {}, carry

    lost = rj.Metric(lambda snapshot, lr: (), update)
    data = rj.sweep(
        sgd, jnp.ones(2), 1100, grid={"lr": [0.5, 3.0]}, metrics=[lost], every=550
    )
    jax.effects_barrier()
    assert data.diverged_at.sel(flow="run", lr=3.0) > 550
    # Halvings from 2^550 / 8, at the midpoint, to 1e30, and none once the lane is lost.
    assert len(seen) == 6 and sorted(seen)[-2:] == [0.0, 448.0]


BAD = [
    ({"grid": {"lr": []}}, "grid axis 'lr'"),
    ({"grid": {"lr": [0.1, float("nan")]}}, "finite"),
    ({"grid": {"lr": ["a"]}}, "finite real numbers"),
    ({"grid": {"lr": [[0.1]]}}, "array of shape"),
    ({"grid": {"l r": [0.1]}}, "like a Python variable"),
    ({"grid": {"lr": [0.1], ("lr", "b"): ([1], [2])}}, "given twice"),
    ({"grid": {("lr", "b"): ([0.1, 0.2], [1.0])}}, "zipped"),
    ({"grid": {("lr", "b"): (0.1, 1.0)}}, "zipped"),
    ({"grid": {("lr", "b"): ([0.1, 0.2],)}}, "each of its names"),
    ({"grid": {"step": [1], "lr": [0.1]}}, "dimension of that name"),
    ({"grid": {"lr": [0.1], "seed": [0.5]}}, "whole numbers"),
    ({"grid": {"lr": [0.1], "seed": [-1]}}, "whole numbers"),
    ({"grid": {"lr": [0.1], "seed": [0]}}, "function of a key"),
    ({"grid": {"seed": 0}, "params": draw}, "lr is missing"),
    ({"start": -1}, "start"),
    ({"steps": 7, "every": 2}, "every=2"),
    ({"every": 2, "time_chunk": 3}, "time_chunk"),
    ({"lane_chunk": 0}, "lane_chunk"),
    ({"substeps": 0}, "substeps"),
    ({"settings": {"tags": ["a"]}}, "settings: tags"),
    ({"flows": {"run": rj.flows.stable(heavy)}}, "'run'"),
    ({"flows": {"other": rj.flows.stable(heavy)}}, "other dynamics"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_before_anything_is_compiled(change, words, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    settings = {"params": jnp.ones(2), "steps": 4, "grid": {"lr": [0.1, 0.2]}} | change
    with pytest.raises(ValueError, match=words):
        rj.sweep(rj.dynamics(optax.sgd, loss), **settings)


def test_a_setting_that_python_branches_on_cannot_be_an_axis():
    dynamics = rj.dynamics(
        lambda h: optax.sgd(h["lr"], momentum=0.9, nesterov=bool(h["nesterov"])), loss
    )
    with pytest.raises(ValueError, match="decision in Python"):
        rj.sweep(dynamics, jnp.ones(2), 4, grid={"lr": 0.1, "nesterov": [0, 1]})
