"""Steps over several saved moments, and oscillations that grow from nothing."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import lane
from test_integrate import spent

import rodjax as rj

ETA, DRIFT, STEPS = 0.3, 0.02, 400
START = {"x": jnp.array(1e-12), "y": jnp.array(6.0)}
PID = diffrax.PIDController
LONG = {"solver": rj.RKC(bea=True), "substeps": 0.5}


def ramp(params):
    """A parabola that gets sharper until the oscillation in it holds that."""
    return 0.5 * params["y"] * params["x"] ** 2 - DRIFT * params["y"]


SGD = rj.dynamics(optax.sgd, ramp)
FLOWS = {
    "cartesian": rj.flows.modulated(SGD, floor=0.0),
    "polar": rj.flows.polar(rj.flows.modulated(SGD, floor=0.0)),
    "unit": rj.flows.polar(rj.flows.modulated(SGD, degree=1, floor=0.0), unit=True),
}
SOLVERS = {
    "heun": ("polar", diffrax.Heun(), 1.0),
    "tsit5": ("polar", diffrax.Tsit5(), 1.0),
    "kvaerno3": ("polar", diffrax.Kvaerno3(), 1.0),
    "rkc": ("polar", rj.RKC(), 1.0),
    "rkc with bea": ("unit", rj.RKC(bea=True), 0.5),
}


def onset(path):
    """The step at which the oscillation is first above 0.05."""
    return int(np.argmax(np.asarray(path.metrics["amplitude"]) > 0.05))


def solve(flow, start=START, steps=STEPS, lr=ETA, **options):
    return rj.integrate(flow, start, steps, lr=lr, **options)


def begun():
    """A run that has all but stopped to oscillate, and goes on to burst."""
    window = rj.warm_up(SGD, START, 10, lr=ETA)
    return window, rj.descend(SGD, window, STEPS, lr=ETA)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_onset_is_where_the_run_has_it(name, rtol):
    """From an oscillation of 6e-18, far below the controller's tolerance."""
    flow, solver, substeps = SOLVERS[name]
    window, run = begun()
    assert (
        np.min(run.metrics["amplitude"])
        < 1e-17
        < 0.1
        < np.max(run.metrics["amplitude"])
    )
    path = solve(
        FLOWS[flow],
        window,
        solver=solver,
        substeps=substeps,
        stepsize_controller=PID(rtol=rtol, atol=rtol * 1e-2),
    )
    assert abs(onset(path) - onset(run)) <= 2


def test_without_its_logarithm_the_onset_is_lost():
    """What the others would pass by if it did not matter."""
    window, run = begun()
    adapt = PID(rtol=1e-3, atol=1e-5)
    path = solve(
        FLOWS["cartesian"], window, solver=diffrax.Tsit5(), stepsize_controller=adapt
    )
    assert abs(onset(path) - onset(run)) > 10


def test_polar_is_the_same_flow():
    window, _ = begun()
    paths = [solve(FLOWS[name], window, 300) for name in ("cartesian", "polar")]
    size = paths[0].metrics["amplitude"]
    np.testing.assert_allclose(paths[1].metrics["amplitude"], size, rtol=0.05)
    np.testing.assert_allclose(paths[1].params["y"], paths[0].params["y"], rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_oscillation_may_vanish(dtype):
    """Below its threshold it is four fifths of itself after every step, for ever."""
    bowl = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    flow = rj.flows.polar(rj.flows.modulated(bowl, floor=0.0))
    start = rj.warm_up(bowl, jnp.ones(2, dtype), 3, lr=1.8)
    path = rj.integrate(flow, start, 4000, lr=1.8, every=500)
    assert np.isfinite(path.metrics["loss"]).all()
    assert path.metrics["amplitude"][-1] == 0.0 < path.metrics["amplitude"][0]
    # On its own scale it is known to the end.
    rate = (path.final.state.log_size - np.log(path.metrics["amplitude"][0])) / 4000
    assert abs(rate - np.log(0.8)) < 0.01


def test_a_flow_without_a_delta_is_refused():
    with pytest.raises(TypeError, match=r"polar is for flows .* `delta`"):
        solve(rj.flows.polar(rj.flows.stable(SGD)))


def test_constant_steps_pass_over_saved_moments():
    """Two optimizer steps a step; odd moments are interpolated, even ones are met."""
    window, _ = begun()
    every = {n: solve(FLOWS["unit"], window, 60, every=n, **LONG) for n in (1, 2)}
    met = lane(every[1].params, slice(None, None, 2))
    np.testing.assert_allclose(met["y"], every[2].params["y"], rtol=1e-9)
    y = np.asarray(every[1].params["y"])
    middle = 0.5 * (y[0:-1:2] + y[2::2])
    np.testing.assert_allclose(y[1::2], middle, atol=1e-5)
    np.testing.assert_allclose(every[1].final.time, 70.0)
    np.testing.assert_allclose(every[1].steps, 10.0 + np.arange(61.0))


@pytest.mark.parametrize("controller", [None, PID(rtol=1e-3, atol=1e-5)])
def test_stages_are_counted(controller):
    """All of them, those of refused steps too."""
    bowl = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
    flow = rj.flows.stable(bowl)
    made, told = spent(flow, 32, stepsize_controller=controller, **LONG)
    assert made == told > 0
    if controller is None:
        # Three stages for two steps, and the first slope.
        assert told == 3 * 16 + 1


def test_a_lost_lane_stays_alone():
    """In a stretch of moments that are solved for together."""
    rates = jnp.array([0.005, 3.0, 0.01])
    one = lambda lr: rj.integrate(
        rj.flows.stable(rj.dynamics(optax.sgd, lambda w: w**4)),
        jnp.array(2.0),
        32,
        lr=lr,
        solver=diffrax.Heun(),
        substeps=0.25,
        limit=np.inf,
    )
    paths = jax.vmap(one)(rates)
    lost = np.asarray(paths.diverged_at)
    assert np.isfinite(lost).tolist() == [False, True, False]
    assert np.isfinite(paths.final.state.params).all()
    assert np.isnan(paths.params[1, int(lost[1]) :]).all()
    for i in (0, 2):
        np.testing.assert_allclose(paths.params[i], one(rates[i]).params, rtol=1e-12)


def test_a_long_step_is_differentiable():
    def last(lr):
        return solve(FLOWS["unit"], START, 20, lr=lr, **LONG).params["y"][-1]

    slope = jax.grad(last)(0.3)
    h = 1e-5
    truth = (last(0.3 + h) - last(0.3 - h)) / (2 * h)
    np.testing.assert_allclose(slope, truth, rtol=1e-6)


def test_steps_longer_than_a_sweep_saves_are_refused():
    grid = {"lr": jnp.array([0.1])}
    sweep = partial(rj.sweep, SGD, START, 4, grid=grid, flows={"m": FLOWS["unit"]})
    with pytest.raises(ValueError, match=r"steps of 2, longer .* give every=2 or more"):
        sweep(**LONG)
    assert np.isfinite(sweep(every=2, **LONG).distance.sel(flow="m")).all()


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Heun()])
def test_the_onset_of_the_reference_problem(solver, rtol):
    problem = rj.problems.digits_mlp(dtype="float64")
    sgd = rj.dynamics(optax.sgd, problem.loss)
    window = rj.warm_up(sgd, problem.params, 150, lr=0.6)
    run = rj.descend(sgd, window, 80, lr=0.6, keep=lambda params: None)
    flow = rj.flows.polar(rj.flows.modulated(sgd))
    path = rj.integrate(
        flow,
        window,
        80,
        lr=0.6,
        solver=solver,
        stepsize_controller=PID(rtol=rtol, atol=rtol * 1e-2),
        keep=lambda params: None,
    )
    assert abs(onset(path) - onset(run)) <= 2
