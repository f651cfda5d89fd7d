"""Gradient descent on Berthier's examples against the laws published of them."""

import math
from functools import lru_cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import berthier_cycle, dense_hessian, order
from scipy.integrate import solve_ivp

from rodjax.problems import berthier, berthier_circle, berthier_matrix

ETA = 0.3
EDGE = 2.0 / ETA
#: Of the circle |y| + 3 = 2 / eta.
RADIUS = EDGE - 3.0
#: -Psi grad h, of the example with a matrix.
FORCING = np.array([[2.0, 2**-0.5], [2**-0.5, 1.0]])
SMALL = (1e-3, 1e-4, 1e-5)


def descend(make, steps, **options):
    """The problem's iterates x and y under gradient descent, the start the first."""
    problem = make(**options)

    def step(w, _):
        after = jax.tree.map(lambda a, g: a - ETA * g, w, jax.grad(problem.loss)(w))
        return after, w

    path = jax.jit(lambda w: jax.lax.scan(step, w, None, steps + 1)[1])(problem.params)
    return np.asarray(path["x"]), np.asarray(path["y"])


def parts(x):
    """Midpoint and alternating part at the steps from 1 on, but for the last."""
    sign = (-1.0) ** np.arange(1, len(x) - 1).reshape(-1, *[1] * (x.ndim - 1))
    before, here, after = x[:-2], x[1:-1], x[2:]
    return (before + 2 * here + after) / 4, sign * (2 * here - before - after) / 4


def solved(law, start, count, eps):
    """The solution of z' = law(z) in t2 = sqrt(eps) t, at the steps of `parts`."""
    times = np.arange(count) * eps**0.5
    span = (0.0, times[-1])
    found = solve_ivp(
        lambda _, z: law(z), span, start, t_eval=times, rtol=1e-8, atol=1e-10
    )
    return found.y.T[1:-1]


def energy(a, u):
    return u**2 / 2 + a**2 / 4 - np.log(a**2) / 2


@lru_cache
def swings(eps, zeta, time, a=0.5):
    """a and u until t2 = time, from an oscillation a at the edge itself."""
    small = eps**0.5
    start = (small * a, EDGE)
    x, y = descend(berthier, int(time / small), eps=eps, zeta=zeta, initial=start)
    return parts(x)[1] / small, (parts(y)[0] - EDGE) / small


# --- the minimal example -------------------------------------------------------------


def test_the_published_figures():
    x, y = descend(berthier, 3000)
    assert np.argmax(y + 3 * x > EDGE) == 555
    # From rounding errors on: an e-th more of them is 0.012 less of height.
    assert abs(y.max() - 7.58) < 0.02
    assert abs(y[-300:].mean() - 6.676) < 1e-3
    np.testing.assert_allclose((x[-300:] ** 2).mean(), 2 * 0.01, rtol=5e-3)


@pytest.mark.parametrize(
    ("eps", "zeta"), [(1e-2, 1.0), (1e-2, 0.0), (1e-2, -1.0), (1e-4, 0.5)]
)
def test_a_cycle_of_two_steps(eps, zeta):
    c, d, m, k = berthier_cycle(ETA, eps, zeta)
    x, y = descend(berthier, 2, eps=eps, zeta=zeta, initial=(c + d, m + k))
    np.testing.assert_allclose(x, [c + d, c - d, c + d], rtol=1e-12)
    np.testing.assert_allclose(y, [m + k, m - k, m + k], rtol=1e-14)
    np.testing.assert_allclose(c, -ETA * eps * (3 * zeta - 1) / 2, rtol=5 * eps**0.5)


@pytest.mark.parametrize("zeta", [0.4, 2**0.5 / 3, 1.0])
def test_swings_about_the_cycle_are_damped_iff_nine_zeta_squared_exceed_two(zeta):
    """Their multiplier is 1 + eta^2 eps (2 - 9 zeta^2) / 2 per step."""
    growth = []
    for eps in (1e-2, 1e-3):
        c, d, m, k = berthier_cycle(ETA, eps, zeta)
        problem = berthier(eps=eps, zeta=zeta)
        product = np.eye(2)
        for s in (1, -1):
            at = {"x": jnp.asarray(c + s * d), "y": jnp.asarray(m + s * k)}
            product = (np.eye(2) - ETA * dense_hessian(problem.loss, at)) @ product
        first, second = np.linalg.eigvals(product)
        np.testing.assert_allclose(abs(first), abs(second), rtol=1e-12)
        growth.append(np.log(abs(first)) / 2 / (ETA**2 * eps))
    # What is left is smaller by one order of eps.
    rest = np.array(growth) - (2 - 9 * zeta**2) / 2
    assert abs(rest[0]) < 0.02 and abs(rest[1]) < 0.12 * abs(rest[0])


@pytest.mark.parametrize("zeta", [0.0, 1.0])
def test_swings_obey_their_law(zeta):
    """a' = eta a u, u' = eta (1 - a^2 / 2), to the order sqrt(eps)."""
    law = lambda z: (ETA * z[0] * z[1], ETA * (1 - z[0] ** 2 / 2))
    errors, changes = [], []
    for eps in SMALL:
        a, u = swings(eps, zeta, 15.0)
        truth = solved(law, (0.5, 0.0), len(a) + 2, eps)
        errors.append(abs(np.stack([a, u], 1) - truth).max())
        changes.append(np.ptp(energy(a, u)))
    assert errors[-1] < 0.02 and abs(order(SMALL, errors) - 0.5) < 0.05
    # Of the energy, of which 0.41 is above the least, over an orbit.
    assert changes[-1] < 0.02 and abs(order(SMALL, changes) - 0.5) < 0.05


def test_the_least_energy_is_that_of_the_cycle():
    a = np.linspace(0.5, 3.0, 2501)
    least = energy(a, 0.0)
    np.testing.assert_allclose(a[np.argmin(least)] ** 2, 2.0, atol=3e-3)
    np.testing.assert_allclose(least.min(), (1 - math.log(2)) / 2, atol=1e-6)
    found = swings(1e-5, 1.0, 15.0, a=2**0.5)
    np.testing.assert_allclose(energy(*found), least.min(), atol=1e-4)


@pytest.mark.parametrize("zeta", [0.0, 0.45, 0.49, 1.0])
def test_wide_swings_are_damped_iff_nine_zeta_squared_exceed_two(zeta):
    """Nine orbits; E' = eta^2 eps (2 - 9 zeta^2) var(a^2) / 8 per step.

    The factor is ours: a lags behind by half a step (the 2), and the centre of x, at
    -3 eta zeta a^2 / 4, takes part in the sharpness (the 9). Near the cycle, where
    E is var(a^2) / 8 above its least, it is twice the rate of small swings.
    """
    eps = 1e-4
    a, u = swings(eps, zeta, 150.0)
    laps = np.flatnonzero((u[:-1] < 0) & (u[1:] >= 0))
    assert len(laps) == 9
    squares = [a[i:j] ** 2 for i, j in pairwise(laps)]
    # y is back after an orbit, and with it the sum of what moved it.
    np.testing.assert_allclose([s.mean() for s in squares], 2.0, atol=2e-3)
    share = -u[laps] / (u[laps + 1] - u[laps])
    found = energy(a, u)
    at = found[laps] + share * (found[laps + 1] - found[laps])
    rate = (at[-1] - at[0]) / (laps[-1] - laps[0]) / (ETA**2 * eps)
    spread = np.mean([s.var() for s in squares])
    np.testing.assert_allclose(rate, (2 - 9 * zeta**2) * spread / 8, rtol=1e-2)
    assert (np.diff(at) < 0).all() if zeta**2 > 2 / 9 else (np.diff(at) > 0).all()


# --- the circle ----------------------------------------------------------------------


def test_swings_at_the_circle_obey_the_law_of_codimension_one():
    """<grad h, grad S> = -cos(theta) and |grad S| = 1, along y."""
    theta = 1.0
    law = lambda z: (ETA * z[0] * z[1], ETA * (math.cos(theta) - z[0] ** 2 / 2))
    errors = []
    for eps in SMALL:
        small = eps**0.5
        start = (0.8 * small, RADIUS * math.cos(theta), RADIUS * math.sin(theta))
        x, y = descend(berthier_circle, int(15 / small), eps=eps, initial=start)
        u = (np.linalg.norm(parts(y)[0], axis=1) - RADIUS) / small
        truth = solved(law, (0.8, 0.0), len(x), eps)
        errors.append(abs(np.stack([parts(x)[1] / small, u], 1) - truth).max())
    assert errors[-1] < 5e-3 and abs(order(SMALL, errors) - 0.5) < 0.05


def constrained(begun, time):
    """The flow of -grad h, in eta eps t, on the circle, from an angle."""
    theta = 2 * np.arctan(np.tan(begun / 2) * np.exp(-time / RADIUS))
    return RADIUS * np.stack([np.cos(theta), np.sin(theta)], 1)


def test_the_slow_motion_becomes_the_constrained_flow():
    """From an oscillation in balance, a^2 = 2 cos(theta), to the order eps."""
    sizes, errors = (2e-2, 1e-2, 5e-3, 2.5e-3), []
    for eps in sizes:
        start = (RADIUS * math.cos(1.0), RADIUS * math.sin(1.0))
        swing = math.sqrt(2 * math.cos(1.0) * eps)
        steps = round(10 / eps)
        x, y = descend(berthier_circle, steps, eps=eps, initial=(swing, *start))
        time = ETA * eps * np.arange(1, steps)
        truth = constrained(1.0, time)
        errors.append(np.linalg.norm(parts(y)[0] - truth, axis=1).max())
        # By then theta has gone from 1 to 0.47.
        late = slice(-300, None)
        angle = np.arctan2(truth[late, 1], truth[late, 0]).mean()
        np.testing.assert_allclose(
            (x[late] ** 2).mean(), 2 * eps * np.cos(angle), rtol=5e-2
        )
    assert errors[-1] < 0.01 and abs(order(sizes, errors) - 1.0) < 0.1


def test_from_below_the_edge_too():
    """The overshoot is of the order sqrt(eps), and forgotten to the order eps."""
    sizes, most, last = (1e-2, 1e-3), [], []
    reached = math.sqrt(RADIUS**2 - 4)
    for eps in sizes:
        _, y = descend(berthier_circle, round(30 / eps), eps=eps)
        y = parts(y)[0]
        time = ETA * eps * np.arange(1, len(y) + 1)
        free = np.stack([time, np.full_like(time, 2.0)], 1)
        late = np.maximum(time - reached, 0.0)
        edge = constrained(math.atan2(2.0, reached), late)
        gap = np.linalg.norm(y - np.where((late > 0)[:, None], edge, free), axis=1)
        assert gap[time < reached].max() < 2 * eps
        most.append(gap.max())
        last.append(gap[-1])
    assert abs(order(sizes, most) - 0.5) < 0.1 and most[-1] < 0.3
    assert abs(order(sizes, last) - 1.0) < 0.1 and last[-1] < 0.002


# --- the matrix ----------------------------------------------------------------------


def matrix(y):
    off = y[..., 2] / 2**0.5
    rows = np.stack([y[..., 0], off, off, y[..., 1]], -1)
    return rows.reshape(*y.shape[:-1], 2, 2)


def test_swings_at_two_eigenvalues_obey_the_matrix_law():
    def law(z):
        a, u = z[:2], matrix(z[2:])
        du = ETA * (FORCING - np.outer(a, a) / 2)
        return (*(ETA * u @ a), du[0, 0], du[1, 1], 2**0.5 * du[0, 1])

    errors = []
    for eps in SMALL:
        small = eps**0.5
        start = (0.8 * small, 1.2 * small, EDGE, EDGE, 0.0)
        x, y = descend(berthier_matrix, int(10 / small), eps=eps, initial=start)
        u = (parts(y)[0] - np.array([EDGE, EDGE, 0.0])) / small
        found = np.concatenate([parts(x)[1] / small, u], 1)
        truth = solved(law, (0.8, 1.2, 0.0, 0.0, 0.0), len(x), eps)
        errors.append(abs(found - truth).max())
    assert errors[-1] < 0.1 and abs(order(SMALL, errors) - 0.5) < 0.1


def test_both_eigenvalues_stay_at_the_edge():
    """And <x x^T> = 2 eps C, of rank two, which no oscillation is at any one time."""
    x, y = descend(berthier_matrix, 8000)
    values = np.linalg.eigvalsh(matrix(y))
    first, second = (int(np.argmax(v > EDGE)) for v in values.T[::-1])
    assert 200 < first < 300 < second < 1200
    # But for the centre of x, which takes part in the sharpness.
    np.testing.assert_allclose(
        matrix(y)[-4000:].mean(0), EDGE * np.eye(2), atol=10 * 0.01
    )
    spread = x[-6000:].T @ x[-6000:] / 6000
    np.testing.assert_allclose(spread / 0.01, 2 * FORCING, atol=0.1)
    assert np.ptp(values[-2000:], axis=0).min() > 0.1
