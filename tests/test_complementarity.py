"""Semidefinite complementarity problems, against a conic solver and closed forms."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import unchecked

from rodjax.linalg import complementarity

solve = jax.jit(complementarity)


def symmetric(rng, *shape):
    m = rng.normal(size=(*shape, shape[-1]))
    return (m + np.swapaxes(m, -1, -2)) / 2


def gram(factors):
    """B[X] = sum_n <G_n, X> G_n."""
    return np.einsum("nij,nkl->ijkl", factors, factors)


def full(k, rng):
    return gram(symmetric(rng, k * (k + 1) // 2 + 2, k))


def coercive(k, rank, rng):
    """Singular, yet with a solution for every A, as one factor is definite."""
    factors = symmetric(rng, rank, k)
    factors[0] = np.eye(k) + 0.1 * factors[0]
    return gram(factors)


def from_solution(x_spectrum, s_spectrum, b, rng):
    """A problem with the solution X = Q diag Q', S = Q diag Q'."""
    q = np.linalg.qr(rng.normal(size=(len(x_spectrum),) * 2))[0]
    x, s = (q * np.asarray(v) @ q.T for v in (x_spectrum, s_spectrum))
    return s - np.einsum("ijkl,kl->ij", b, x), x


def objective(a, b, x):
    return np.sum(a * x) + np.einsum("ijkl,ij,kl->", b, x, x) / 2


def violation(a, b, x):
    """Largest violation of any of the conditions, A being of size 1."""
    s = a + np.einsum("ijkl,kl->ij", b, x)
    least = min(np.linalg.eigvalsh(x)[0], np.linalg.eigvalsh(s)[0])
    return max(-least, abs(np.sum(x * s)), np.abs(x - x.T).max())


def reference(a, b):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cvxpy = pytest.importorskip("cvxpy")
        k = len(a)
        values, vectors = np.linalg.eigh(b.reshape(k * k, k * k))
        kept = values > 1e-12 * values[-1]
        root = (vectors[:, kept] * np.sqrt(values[kept])).T
        x = cvxpy.Variable((k, k), PSD=True)
        quadratic = cvxpy.sum_squares(root @ cvxpy.vec(x, order="C")) / 2
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.trace(a @ x) + quadratic))
        found = []
        # What it cannot reach it may give up far away: the best answer counts.
        for tol in (1e-12, 1e-11, 1e-10):
            accuracy = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tol)
            problem.solve(solver=cvxpy.CLARABEL, **accuracy)
            found.append(x.value)
    return min(found, key=lambda x: violation(a, b, x))


# Every size compiles anew.
@pytest.mark.parametrize(
    "k", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 5)), 2, 3, 6]
)
def test_agrees_with_a_conic_solver(k):
    rng = np.random.default_rng(k)
    operators = [full(k, rng), full(k, rng), coercive(k, 1, rng), coercive(k, 2, rng)]
    shifts = [-0.5, -3.0, 0.0, 0.5]
    for index, (b, shift) in enumerate(zip(operators, shifts, strict=True)):
        a = symmetric(rng, k) + shift * np.eye(k)
        a = a / np.linalg.norm(a)
        solution = solve(a, b)
        x, expected = np.asarray(solution.x), reference(a, b)
        assert solution.residual < 1e-9
        assert violation(a, b, x) < 1e-8
        assert objective(a, b, x) == pytest.approx(objective(a, b, expected), abs=1e-6)
        np.testing.assert_allclose(
            solution.slack, a + np.einsum("ijkl,kl->ij", b, x), atol=1e-12
        )
        if index < 2:
            np.testing.assert_allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_no_curvature_to_balance_gives_exactly_zero(k):
    rng = np.random.default_rng(k)
    root = rng.normal(size=(k, k))
    for a in (root @ root.T, np.zeros((k, k)), np.outer(root[0], root[0])):
        for b in (full(k, rng), np.zeros((k,) * 4)):
            solution = solve(a, b)
            assert np.all(solution.x == 0)
            assert solution.iterations == 0
            assert solution.residual < 1e-14
            np.testing.assert_allclose(solution.slack, a, atol=1e-14)


@pytest.mark.parametrize("size_a, size_b", [(1e-30, 1e20), (1e12, 1e-9), (1e150, 1.0)])
def test_units_do_not_matter(size_a, size_b):
    rng = np.random.default_rng(0)
    for k in (1, 3):
        a, b = symmetric(rng, k) - 2 * np.eye(k), full(k, rng)
        x = solve(a, b).x
        scaled = solve(size_a * a, size_b * b)
        assert scaled.residual < 1e-10
        np.testing.assert_allclose(scaled.x * (size_b / size_a), x, atol=1e-6)


def test_rotation_rotates_the_solution():
    rng = np.random.default_rng(1)
    a, b = symmetric(rng, 3) - np.eye(3), full(3, rng)
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotated = solve(q @ a @ q.T, np.einsum("ijkl,ai,bj,ck,dl->abcd", b, q, q, q, q))
    np.testing.assert_allclose(rotated.x, q @ solve(a, b).x @ q.T, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_recovers_solutions_of_every_rank(rank):
    rng = np.random.default_rng(rank)
    here = np.arange(3) < rank
    for _ in range(5):
        b = full(3, rng)
        a, x = from_solution(here * [0.5, 1, 2], ~here * [0.3, 1, 2], b, rng)
        solution = solve(a, b)
        assert solution.residual < 1e-10
        np.testing.assert_allclose(solution.x, x, atol=1e-6)


def test_an_eigenvalue_zero_of_both_matrices_costs_accuracy_only():
    rng = np.random.default_rng(2)
    for _ in range(5):
        b = full(3, rng)
        a, x = from_solution([1.0, 0, 0], [0, 0, 1.0], b, rng)
        solution = solve(a, b)
        assert solution.residual < 1e-9
        np.testing.assert_allclose(solution.x, x, atol=1e-5)


@pytest.mark.parametrize("margin", [-1e-3, -1e-5, -1e-8, -1e-14, 0.0, 1e-14, 1e-8])
def test_an_eigenvalue_near_zero(margin):
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a, b = q * np.array([margin, 0.5, 1.0]) @ q.T, full(3, rng)
    solution = solve(a, b)
    # For a simple eigenvalue below zero, to first order in it.
    vector = q[:, 0]
    stiffness = np.einsum("ijkl,i,j,k,l->", b, *4 * [vector])
    expected = np.outer(vector, vector) * max(-margin, 0) / stiffness
    assert solution.residual < 1e-7
    np.testing.assert_allclose(solution.x, expected, rtol=0.05, atol=1e-7 + margin**2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_no_solution_is_finite_and_says_so(k, dtype):
    direction = np.zeros((1, k, k))
    direction[0, -1, -1] = k > 1
    a = np.diag(np.linspace(-1, 1, k) if k > 1 else [-1.0])
    for b in (np.zeros((k,) * 4), gram(direction)):
        solution = solve(jnp.asarray(a, dtype), jnp.asarray(b, dtype))
        assert all(np.all(np.isfinite(leaf)) for leaf in solution)
        assert solution.residual > 0.01
        assert solution.iterations <= 40


@pytest.mark.parametrize(
    "k", [2, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4))]
)
def test_float32(k):
    rng = np.random.default_rng(4)
    eye = np.eye(k)
    b = full(k, rng) + 3 * np.einsum("ik,jl->ijkl", eye, eye)
    b = (b + b.swapaxes(2, 3)) / 2
    here = np.arange(k) < (k + 1) // 2
    a, x = from_solution(here * 1.0, ~here * 1.0, b, rng)
    solution = solve(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    assert solution.x.dtype == solution.residual.dtype == jnp.float32
    assert solution.residual < 1e-4
    np.testing.assert_allclose(solution.x, x, atol=1e-4)


def test_vmap_equals_single_solves():
    rng = np.random.default_rng(5)
    a = symmetric(rng, 8, 3) - 0.5 * np.eye(3)
    a[3] = np.eye(3)
    b = np.stack([full(3, rng) for _ in a])
    batch = jax.jit(jax.vmap(complementarity))(a, b)
    for index in range(len(a)):
        single = solve(a[index], b[index])
        np.testing.assert_allclose(batch.x[index], single.x, atol=1e-6)
        assert batch.residual[index] < 1e-10


def test_tolerance_saves_iterations():
    rng = np.random.default_rng(7)
    a, b = symmetric(rng, 3) - np.eye(3), full(3, rng)
    loose = jax.jit(partial(complementarity, tol=1e-3))(a, b)
    assert 1e-11 < loose.residual <= 1e-3
    assert loose.iterations < solve(a, b).iterations


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((2, 3), 2, "a must be a square"),
        ((0, 0), 0, "a must be"),
        ((2, 2), 3, "b must"),
    ],
)
def test_rejects_wrong_shapes(a, b, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        complementarity(jnp.ones(a), jnp.ones((b,) * 4))


@jax.jit
def differentiated(a, b, da, db, weight):
    """The solution's tangent, and the same product with `weight` in reverse."""
    solution, moved = jax.jvp(complementarity, (a, b), (da, db))

    def against(a, b):
        solution = complementarity(a, b)
        return jnp.sum(weight * (solution.x + solution.slack))

    back = jax.grad(against, (0, 1))(a, b)
    return solution, moved, jnp.sum(back[0] * da) + jnp.sum(back[1] * db), back


@pytest.mark.parametrize(
    "k, rank",
    [
        *(pytest.param(1, r, marks=pytest.mark.slow) for r in range(2)),
        *((2, 1), (3, 0), (3, 1), (3, 2), (3, 3)),
    ],
)
def test_derivative_along_a_path_of_known_solutions(k, rank):
    # X and S move with their eigenvectors and B at will; A is what they ask for.
    rng = np.random.default_rng(10 * k + rank)
    here = np.arange(k) < rank
    q = np.linalg.qr(rng.normal(size=(k, k)))[0]
    skew = rng.normal(size=(k, k))
    skew = skew - skew.T

    def of(spectrum, change):
        m = q * spectrum @ q.T
        return m, skew @ m - m @ skew + q * change @ q.T

    x, dx = of(here * [0.5, 1, 2][:k], here * rng.normal(size=k))
    s, ds = of(~here * [0.3, 1, 2][:k], ~here * rng.normal(size=k))
    b, db = full(k, rng), gram(symmetric(rng, 2, k))
    apply = lambda b, x: np.einsum("ijkl,kl->ij", b, x)
    a, da = s - apply(b, x), ds - apply(db, x) - apply(b, dx)
    weight = symmetric(rng, k)
    solution, moved, product, back = differentiated(a, b, da, db, weight)
    np.testing.assert_allclose(solution.x, x, atol=1e-6)
    size = np.abs(dx).max() + np.abs(ds).max()
    np.testing.assert_allclose(moved.x, dx, atol=2e-6 * size)
    np.testing.assert_allclose(moved.slack, ds, atol=5e-6 * size)
    assert moved.residual == 0
    expected = np.sum(weight * (moved.x + moved.slack))
    np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(back[0], back[0].T, atol=1e-12)


def test_derivative_agrees_with_differences():
    rng = np.random.default_rng(8)
    a, b = symmetric(rng, 3) - 0.5 * np.eye(3), full(3, rng)
    da, db = symmetric(rng, 3), gram(symmetric(rng, 2, 3))
    solution, moved, *_ = differentiated(a, b, da, db, np.eye(3))
    # Something is at the edge, and something is not.
    assert 0 < np.sum(np.linalg.eigvalsh(solution.x) > 1e-3) < 3
    h = 1e-3
    ahead, behind = solve(a + h * da, b + h * db), solve(a - h * da, b - h * db)
    slope = (ahead.x - behind.x) / (2 * h)
    np.testing.assert_allclose(moved.x, slope, atol=1e-3 * np.abs(slope).max())


def test_derivatives_of_lanes_with_and_without_an_edge():
    rng = np.random.default_rng(9)
    a = np.stack([symmetric(rng, 3) - np.eye(3), np.eye(3), np.zeros((3, 3))])
    b = np.stack([full(3, rng) for _ in a])
    da, weight = symmetric(rng, 3), np.eye(3)
    lanes = jax.vmap(lambda a, b: differentiated(a, b, da, 0 * b, weight))(a, b)
    alone = differentiated(a[0], b[0], da, 0 * b[0], weight)
    np.testing.assert_allclose(lanes[1].x[0], alone[1].x, rtol=1e-5, atol=1e-6)
    # No curvature to balance: X stays zero, and the slack is A.
    np.testing.assert_array_equal(lanes[1].x[1:], 0)
    np.testing.assert_allclose(lanes[1].slack[1:], np.stack([da, da]), atol=1e-14)
    np.testing.assert_allclose(lanes[2][1:], np.trace(da), rtol=1e-12)
