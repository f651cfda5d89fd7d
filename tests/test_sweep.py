"""Sweeps against single runs, lane by lane, in every way of chunking them."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj
from rodjax.sweeps import _program as program

STEPS, WARMUP, EVERY = 40, 4, 4


def loss(w):
    """Two coupled wells; gradient descent diverges beyond a learning rate of 2."""
    return 0.5 * w[0] ** 2 + 0.25 * w[1] ** 4 + 0.1 * w[0] * w[1] - 0.3 * w[1]


def draw(key):
    return 0.5 * jax.random.normal(key, (2,))


def heavy_ball(h):
    return optax.sgd(h["lr"], momentum=h["momentum"])


heavy = rj.dynamics(heavy_ball, loss)
BUILT = {
    "rod": rj.flows.rod,
    # Of the first degree: where an oscillation that decays points to is chaotic beyond.
    "modulated": partial(rj.flows.modulated, degree=1),
}
FLOWS = {name: build(heavy) for name, build in BUILT.items()}
METRICS = (rj.edge_of_stability(heavy),)
GRID = {"lr": [0.1, 1.0, 3.0], "momentum": [0.2, 0.6], "seed": [0, 4]}


def keep_first(w):
    return {"first": w[:1]}


#: One program for all; neither lanes nor moments are multiples of its chunks.
COMMON = {
    "draw": draw,
    "flows": FLOWS,
    "metrics": METRICS,
    "warmup": WARMUP,
    "every": EVERY,
    "keep": keep_first,
    "lane_chunk": 5,
    "time_chunk": 12,
}


@pytest.fixture(scope="module")
def swept():
    return rj.sweep(heavy, None, STEPS, grid=GRID, **COMMON)


def single(lr, momentum, seed, steps=STEPS):
    """The run and the paths of one lane, computed alone."""
    h, params = {"lr": lr, "momentum": momentum}, draw(jax.random.key(seed))
    window = rj.warm_up(heavy, params, WARMUP, lr=h)
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
        found, comparison = lane.sel(flow=flow), rj.compare(run, path)
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
    assert swept.step.values.tolist() == list(range(WARMUP, WARMUP + STEPS + 1, EVERY))
    assert {name: swept[name].values.tolist() for name in GRID} == GRID
    assert swept["params.first"].sizes["params.first_0"] == 1
    assert swept.attrs["solver"] == "default" and swept.attrs["warmup"] == WARMUP


def same(found, expected):
    assert list(found) == list(expected) and found.attrs == expected.attrs
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-7, atol=1e-9)


def test_one_compilation_for_any_grid(swept):
    """Of flows, metrics and optimizers built again, too."""
    again = rj.dynamics(heavy_ball, loss)
    flows = {name: build(again) for name, build in BUILT.items()}
    settings = COMMON | {"flows": flows, "metrics": [rj.edge_of_stability(again)]}
    with jax.checking_leaks(), counted_compilations() as compiled:
        other = {"lr": [0.2, 0.3, 0.5], "momentum": 0.1, "seed": [0]}
        first = rj.sweep(again, None, 2 * STEPS, grid=other, **settings)
        rj.sweep(again, None, 16, grid=GRID | {"seed": range(9)}, **settings)
    assert compiled == []
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


def test_a_lane_lost_before_the_window_has_no_flows(swept):
    lr, h = 1e15, {"lr": 1e15, "momentum": 0.2}
    state, step = heavy.init(draw(jax.random.key(0)), lr=h), 0
    while np.all(np.isfinite(state.params)):
        state, step = heavy.update(state, lr=h), step + 1
    assert step <= WARMUP
    grid = {"lr": [0.1, lr], "momentum": 0.2, "seed": 0}
    data = rj.sweep(heavy, None, STEPS, grid=grid, **COMMON)
    assert data.diverged_at.sel(lr=lr).values.tolist() == [step] * 3
    assert data.evaluations.sel(lr=lr).values.tolist() == [0] * 3
    assert np.isnan(data.loss.sel(lr=lr)).all()
    assert np.isnan(data.final_distance.sel(lr=lr)).all()
    alive = swept.sel(lr=0.1, momentum=0.2, seed=0)
    np.testing.assert_allclose(data.loss.sel(lr=0.1), alive.loss, rtol=1e-7)


def test_memory_bounds_the_chunk(monkeypatch):
    """All lanes and moments at a time, if nothing is said and they fit."""
    seen = []
    settings = {"grid": GRID, "draw": draw, "every": EVERY, "progress": seen.append}
    expected = rj.sweep(heavy, None, STEPS, **settings)
    whole = seen[-1].program
    assert whole.lanes == 12
    room = 0.5 * whole.bytes
    monkeypatch.setattr(program, "memory", lambda devices: room / program.SHARE)
    small = rj.sweep(heavy, None, STEPS, **settings)
    fitted = seen[-1].program
    assert fitted.bytes <= room and 1 < fitted.lanes < 12
    same(small, expected)


@pytest.mark.slow
def test_zipped_axes_and_the_floor():
    floored = rj.flows.modulated(heavy, floor=lambda h: h["floor"])
    grid = {
        ("lr", "momentum"): ([0.3, 1.2], [0.6, 0.1]),
        "floor": [0.0, 1e-3, 1e-2],
    }
    start = jnp.array([0.3, 0.5])
    settings = {"every": 2, "warmup": 3}
    data = rj.sweep(heavy, start, 8, grid=grid, flows={"m": floored}, **settings)
    assert data.distance.dims == ("flow", "lr", "floor", "step")
    assert data.momentum.dims == ("lr",)
    assert data.momentum.sel(lr=1.2) == 0.1
    h = {"lr": 1.2, "momentum": 0.1}
    window = rj.warm_up(heavy, start, 3, lr=h)
    flow = rj.flows.modulated(heavy, floor=1e-3)
    path = rj.integrate(flow, window, 8, lr=h, every=2)
    lane = data.sel(lr=1.2, flow="m", floor=1e-3)
    np.testing.assert_allclose(lane.amplitude, path.metrics["amplitude"], rtol=1e-9)
    sizes = data.amplitude.sel(flow="m", lr=1.2).isel(step=-1).values
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("name", ["edge", "covariance"])
def test_other_flows_take_the_floor_too(name):
    sgd = rj.dynamics(lambda h: optax.sgd(h["lr"]), loss)
    build = getattr(rj.flows, name)
    fixed, swept = build(sgd, floor=1e-3), build(sgd, floor=lambda h: h["floor"])
    h, start = {"lr": 1.0, "floor": 1e-3}, jnp.array([0.3, 0.5])
    y = fixed.init(start, lr=h, key=jax.random.key(0))
    jax.tree.map(
        np.testing.assert_array_equal, y, swept.init(start, lr=h, key=jax.random.key(0))
    )
    smaller = swept.init(start, lr=h | {"floor": 1e-4}, key=jax.random.key(0))
    ends = [flow.observe(y, lr=h)[0] for flow, y in [(fixed, y), (swept, smaller)]]
    spread = [float(jnp.ptp(end[:, 0])) for end in ends]
    assert spread[0] == pytest.approx(10 * spread[1], rel=1e-6)


def test_no_lane_waits_for_one_that_is_lost():
    """A metric whose iterations grow with the parameters, which are huge in the end."""
    sgd = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    seen = []

    def update(snapshot, carry, *, lr):
        size = jnp.max(jnp.abs(snapshot.centre.params))

        def halve(carry):
            size, count = carry
            return size / 2, count + 1

        _, count = jax.lax.while_loop(lambda c: c[0] > 1e30, halve, (size, 0.0))
        jax.debug.callback(lambda count: seen.append(float(count)), count)
        return {}, carry

    lost = rj.Metric(lambda snapshot, *, lr: (), update)
    settings = {"metrics": [lost], "every": 550, "limit": np.inf}
    data = rj.sweep(sgd, jnp.ones(2), 1100, grid={"lr": [0.5, 3.0]}, **settings)
    jax.effects_barrier()
    assert data.diverged_at.sel(flow="run", lr=3.0) > 550
    # Halvings from 2^550 / 8, at the midpoint, to 1e30, and none once the lane is lost.
    assert len(seen) == 6 and sorted(seen)[-2:] == [0.0, 448.0]


gd = rj.dynamics(optax.sgd, loss)


def recording(name, value):
    """A metric of one value."""
    found = {name: jax.tree.map(jnp.asarray, value)}
    return rj.Metric(lambda s, *, lr: (), lambda s, carry, *, lr: (found, carry))


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
    ({"grid": {"seed": 0}, "params": None, "draw": draw}, "lr is missing"),
    ({"draw": draw}, "give one of the two"),
    ({"params": None}, "give one of the two"),
    ({"warmup": -1}, "warmup"),
    ({"steps": 7, "every": 2}, "every=2"),
    ({"every": 2, "time_chunk": 3}, "time_chunk"),
    ({"lane_chunk": 0}, "lane_chunk"),
    ({"substeps": 0}, "substeps"),
    ({"settings": {"tags": ["a"]}}, "settings: tags"),
    ({"settings": {"steps": 3, "data": "mine"}}, "itself says data, steps"),
    ({"metrics": (rj.edge_of_stability(gd), rj.spectrum(gd, 2))}, "'residual' is"),
    ({"metrics": [recording("loss", 0.0)]}, "'loss' is recorded by"),
    ({"metrics": [recording("distance", 0.0)]}, "'distance', recorded by"),
    ({"metrics": [recording("lr", 0.0)]}, "'lr' is the name of"),
    ({"metrics": [recording("both", np.zeros(2))]}, "'both' is not one number"),
    ({"metrics": [recording("tree", {"a": 0.0, "b": 0.0})]}, "'tree' is not one"),
    ({"flows": {"run": rj.flows.stable(heavy)}}, "'run'"),
    ({"flows": {"other": rj.flows.stable(heavy)}}, "other dynamics"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_refused_before_anything_is_compiled(change, words, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    settings = {"params": jnp.ones(2), "steps": 4, "grid": {"lr": [0.1, 0.2]}} | change
    with pytest.raises(ValueError, match=words):
        rj.sweep(gd, **settings)


def test_a_setting_that_python_branches_on_cannot_be_an_axis():
    dynamics = rj.dynamics(
        lambda h: optax.sgd(h["lr"], momentum=0.9, nesterov=bool(h["nesterov"])), loss
    )
    with pytest.raises(ValueError, match="decision in Python"):
        rj.sweep(dynamics, jnp.ones(2), 4, grid={"lr": 0.1, "nesterov": [0, 1]})
