"""Which solvers, steps and adjoints `integrate` takes, and which it refuses."""

import diffrax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import unchecked

import rodjax as rj

START = jnp.ones(1)
BOWL = rj.dynamics(optax.sgd, lambda w: 0.5 * jnp.sum(w**2))
FLOW = rj.flows.stable(BOWL)
PID = diffrax.PIDController(rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "solver", [diffrax.Kvaerno3(), diffrax.Tsit5()], ids=["implicit", "explicit"]
)
def test_adaptive_solvers_solve_to_their_tolerance(solver):
    """On a parabola w(t) = exp(-eta t); far beyond what four steps of Heun can do."""
    options = {"solver": solver, "stepsize_controller": PID}
    path = rj.integrate(FLOW, START, 4, lr=3.0, every=2, **options)
    exact = np.exp(-3.0 * np.arange(0.0, 5.0, 2.0))
    np.testing.assert_allclose(path.params[:, 0], exact, atol=1e-7)
    assert np.isnan(path.evaluations) == isinstance(solver, diffrax.Kvaerno3)


def test_a_solver_whose_stages_are_not_known_says_so():
    solver = diffrax.LeapfrogMidpoint()
    path = rj.integrate(FLOW, START, 2, lr=0.1, solver=solver)
    assert np.isnan(path.evaluations) and np.isinf(path.diverged_at)
    np.testing.assert_allclose(path.params[:, 0], np.exp(-0.1 * np.arange(3)), 1e-4)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps must be a positive multiple"),
        ({"steps": -3}, ValueError, "steps must be a positive multiple"),
        ({"steps": 5, "every": 2}, ValueError, "positive multiple of every=2"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"lr": None}, ValueError, "lr is missing"),
        ({"substeps": 0}, ValueError, "substeps must be positive, got 0"),
        # An implicit and an explicit part; noise; a class; a name.
        (
            {"solver": diffrax.KenCarp4()},
            ValueError,
            "KenCarp4 is for .* a solver of ODEs",
        ),
        ({"solver": diffrax.Sil3()}, ValueError, "Sil3 is for"),
        (
            {"solver": diffrax.SemiImplicitEuler()},
            ValueError,
            "SemiImplicitEuler is for",
        ),
        ({"solver": diffrax.EulerHeun()}, ValueError, "EulerHeun is for"),
        ({"solver": diffrax.ShARK()}, ValueError, "ShARK is for"),
        (
            {"solver": diffrax.Kvaerno3()},
            ValueError,
            "Kvaerno3 is implicit, .*PIDController",
        ),
        ({"solver": diffrax.Heun}, TypeError, "solver must be a diffrax solver"),
        ({"solver": "Heun"}, TypeError, "solver must be a diffrax solver"),
        (
            {"adjoint": diffrax.BacksolveAdjoint()},
            ValueError,
            "adjoint BacksolveAdjoint",
        ),
        ({"adjoint": diffrax.ImplicitAdjoint()}, ValueError, "adjoint ImplicitAdjoint"),
    ],
)
def test_refusals(options, error, message):
    options = {"steps": 4, "lr": 0.1} | options
    with unchecked(), pytest.raises(error, match=message):
        rj.integrate(FLOW, START, **options)
    if set(options) <= {"steps", "lr", "every"}:
        with pytest.raises(error, match=message):
            rj.descend(BOWL, START, **options)
