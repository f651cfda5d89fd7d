"""The largest eigenvalues of matrices with a prescribed decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import SPECTRA, basis, matrix, start

import rodjax as rj
from rodjax.linalg._lobpcg import LOOK, STEPS

# Every k up to 5. Of 20 parameters the matrix is formed, as of 60 with k = 5.
CASES = [(20, 4), (60, 1), (60, 2), (60, 5), (400, 1), (400, 3), (400, 5)]
# In the quick suite.
SINGLE = [(20, 4), (400, 3)]


@jax.jit
def solve(symmetric, guess):
    return rj.top_eigenpairs(lambda v: symmetric @ v, guess)


def check(pairs, name, dtype="float64"):
    """Values, residuals, orthonormality and invariant subspace of a converged solve."""
    n = pairs.vectors.shape[1]
    values, vectors = SPECTRA[name](n)[::-1], basis(n)[:, ::-1]
    rows = np.asarray(pairs.vectors, "float64")
    k = len(rows)
    eps, size = float(jnp.finfo(dtype).eps), abs(values).max()
    scale = max(abs(values[:k]).max(), 1e-300)
    assert {x.dtype for x in pairs[:3]} == {jnp.dtype(dtype)}
    # Rounding allows no residual below eps |A|, however small the eigenvalue.
    floor = 100 * eps * size
    assert float(pairs.residuals.max()) <= max(eps**0.5, floor / scale)
    np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=30 * eps)
    assert np.all(np.diff(pairs.values) <= 0)
    np.testing.assert_allclose(pairs.values, values[:k], rtol=0, atol=floor)
    gaps = rows @ matrix(name, n) - np.asarray(pairs.values)[:, None] * rows
    lengths = np.linalg.norm(gaps, axis=1)
    np.testing.assert_allclose(pairs.residuals, lengths / scale, atol=floor / scale)
    # Davis and Kahan, up to the first gap after the k-th eigenvalue.
    below = [j for j in range(k, n) if values[j - 1] - values[j] > 1e-9 * size]
    if below:
        outside = np.linalg.norm(rows @ vectors[:, below[0] :], 2)
        gap = values[below[0] - 1] - values[below[0]]
        assert outside <= (np.linalg.norm(lengths) + floor) / gap


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        *((*case, "float64") for case in CASES),
        *((*case, "float32") for case in CASES if case in SINGLE),
        *(
            pytest.param(*case, "float32", marks=pytest.mark.slow)
            for case in CASES
            if case not in SINGLE
        ),
    ],
)
def test_top_eigenpairs_of_prescribed_spectra(n, k, dtype):
    for name in SPECTRA:
        symmetric = jnp.asarray(matrix(name, n), dtype)
        check(solve(symmetric, start(k, n, dtype)), name, dtype)


@pytest.mark.parametrize("n", [20, 65])
def test_numpy_agrees_on_what_was_prescribed(n):
    for name, spectrum in SPECTRA.items():
        truth = np.linalg.eigvalsh(matrix(name, n))
        np.testing.assert_allclose(spectrum(n), truth, atol=1e-13)


@pytest.mark.parametrize("n", [20, 65])
def test_top_eigenpair_is_the_first(n):
    symmetric = jnp.asarray(matrix("isolated", n))
    tree = {"a": start(1, n)[0, :5], "b": start(1, n)[0, 5:].reshape(3, -1)}
    flat = lambda v: jnp.concatenate([v["a"], v["b"].ravel()])

    def matvec(v):
        image = symmetric @ flat(v)
        return {"a": image[:5], "b": image[5:].reshape(3, -1)}

    one = jax.jit(lambda guess: rj.top_eigenpair(matvec, guess))(tree)
    many = solve(symmetric, start(1, n))
    assert one.value.shape == one.residual.shape == ()
    assert jax.tree.map(jnp.shape, one.vector) == jax.tree.map(jnp.shape, tree)
    np.testing.assert_allclose(one.value, many.values[0], rtol=1e-14)
    along = abs(float(flat(one.vector) @ many.vectors[0]))
    assert along == pytest.approx(1.0, abs=1e-13)


def counted(matvec):
    """`matvec`, and a list that grows by one for each vector it is given."""
    calls = []

    def counting(v):
        # With an argument, so that vmap calls it for every vector.
        jax.debug.callback(lambda _: calls.append(1), v[0])
        return matvec(v)

    return counting, calls


def cost(solver, calls, guess):
    before = len(calls)
    pairs = solver(guess)
    jax.effects_barrier()
    return len(calls) - before, pairs


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "name", ["close cluster", pytest.param("negative bulk", marks=pytest.mark.slow)]
)
def test_warm_start_saves_products(name, k):
    n = 400
    symmetric = jnp.asarray(matrix(name, n))
    matvec, calls = counted(lambda v: symmetric @ v)
    solver = jax.jit(lambda guess: rj.top_eigenpairs(matvec, guess))
    cold, pairs = cost(solver, calls, start(k, n))
    assert cold == int(pairs.iterations) * k >= 3 * (1 + LOOK) * k
    nudge = jax.random.normal(jax.random.key(3), (k, n)) / n**0.5
    exact, _ = cost(solver, calls, pairs.vectors)
    # One for the residuals, a few more for the noise that is added, and the look.
    assert exact <= (6 + LOOK) * k
    # Where the next step of a trajectory starts.
    near, _ = cost(solver, calls, pairs.vectors + 1e-7 * nudge)
    assert near < cold / 2
    far, warm = cost(solver, calls, pairs.vectors + 1e-3 * nudge)
    assert far < cold
    check(warm, name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["isolated", "rank one", "triple top", "zero"])
def test_degenerate_guesses(name, dtype):
    n, k = 400, 3
    symmetric = jnp.asarray(matrix(name, n), dtype)
    vectors = basis(n)[:, ::-1]
    random = np.asarray(start(k, n))
    guesses = {
        "exact": vectors[:, :k].T,
        "exact and equal": vectors[:, [0, 0, 0]].T,
        "eigenvectors at the bottom": vectors[:, -k:].T,
        "zero": np.zeros((k, n)),
        "one zero": random * [[1], [0], [1]],
        "equal": np.ones((k, n)),
        "dependent": random[[0, 1, 0]] + random[[1, 1, 1]],
        "unit vectors": np.eye(n)[:k],
        "far apart in size": random * [[1e12], [1], [1e-12]],
    }
    for guess in guesses.values():
        check(solve(symmetric, jnp.asarray(guess, dtype)), name, dtype)


@pytest.mark.parametrize("k", [1, 3])
def test_krylov_spaces_that_end_at_once(k):
    # Diagonal and exact: rounding adds no noise that would go on by chance.
    scale = jnp.zeros(400).at[:2].set(jnp.array([1.0, 2.0]))
    pairs = solve_diagonal(scale, jnp.eye(400)[2 : 2 + k])
    np.testing.assert_allclose(pairs.values, [2.0, 1.0, 0.0][:k], atol=1e-14)
    # One vector alone has no search over the whole of a Krylov space.
    assert float(pairs.residuals.max()) < (1e-14 if k > 1 else 0.5 * 2**-26)
    rows = np.asarray(pairs.vectors)
    np.testing.assert_allclose(rows @ rows.T, np.eye(k), atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mix", [0.0, 1e-4])
def test_what_has_overtaken_the_guess_is_found(mix, dtype):
    """An eigenvector that others have grown above, exact or nearly so."""
    n = 2000
    bulk = np.random.default_rng(0).uniform(0, 0.9, n - 2)
    values = jnp.asarray(np.append(bulk, [1.0, 1.1]), dtype)
    guess = jnp.zeros(n, dtype).at[-2].set(1.0).at[-1].set(mix)[None]
    pairs = solve_diagonal(values, guess)
    np.testing.assert_allclose(pairs.values, [1.1], rtol=1e-6)
    assert float(pairs.residuals[0]) < 3e-4
    # Those to the guess, a look, those to the other, and another look.
    assert int(pairs.iterations) < 2 * LOOK + 25


def test_what_has_not_converged_says_so():
    # One eigenvalue every 1 / 4000: no gap to speak of at the top.
    values = jnp.linspace(-1.0, -1e-3, 4000)
    matvec, calls = counted(lambda v: values * v)
    solver = jax.jit(lambda guess: rj.top_eigenpairs(matvec, guess, tol=1e-13))
    for k in (1, 2):
        spent, pairs = cost(solver, calls, start(k, 4000))
        assert spent == STEPS * k
        assert int(pairs.iterations) == STEPS
        scale = np.abs(pairs.values).max()
        assert float(pairs.residuals.max()) > 1e-13
        # Some eigenvalue is that close to each.
        nearest = np.abs(pairs.values[:, None] - values[None]).min(axis=1)
        assert np.all(nearest / scale <= pairs.residuals)


def test_a_looser_tolerance_takes_fewer_products():
    symmetric = jnp.asarray(matrix("close cluster", 400))
    run = lambda tol: rj.top_eigenpairs(lambda v: symmetric @ v, start(3, 400), tol=tol)
    loose, tight = jax.jit(lambda: (run(1e-2), run(1e-12)))()
    assert int(loose.iterations) < int(tight.iterations)
    assert float(tight.residuals.max()) < 1e-12 < float(loose.residuals.max()) < 1e-2


@pytest.mark.parametrize(("n", "k"), [(20, 2), (60, 1), (60, 2)])
def test_lanes_of_a_vmap_equal_single_solves(n, k):
    names = ("isolated", "negative bulk", "zero", "close cluster")
    stack = jnp.stack([jnp.asarray(matrix(name, n)) for name in names])
    guess = start(k, n)
    many = jax.jit(jax.vmap(solve, (0, None)))(stack, guess)
    for i, symmetric in enumerate(stack):
        # A lane that is done waits for the others unchanged.
        one = solve(symmetric, guess)
        assert int(many.iterations[i]) == int(one.iterations)
        np.testing.assert_allclose(many.values[i], one.values, rtol=1e-12)
        check(jax.tree.map(lambda x, i=i: x[i], many), names[i])


def test_a_lane_that_is_not_finite_ends_at_once_and_alone():
    stack = jnp.stack(
        [jnp.full((60, 60), jnp.nan), jnp.asarray(matrix("isolated", 60))]
    )
    pairs = jax.jit(jax.vmap(solve, (0, None)))(stack, start(2, 60))
    assert int(pairs.iterations[0]) == 1
    assert np.all(np.isnan(pairs.residuals[0]))
    check(jax.tree.map(lambda x: x[1], pairs), "isolated")


@jax.jit
def solve_diagonal(values, guess):
    return rj.top_eigenpairs(lambda v: values * v, guess)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e25, 1e30])
def test_scales_whose_squares_single_precision_has_not(scale):
    values = scale * jnp.linspace(0.1, 1.0, 400, dtype=jnp.float32).at[-1].set(1.3)
    pairs = solve_diagonal(values, start(2, 400).astype(jnp.float32))
    truth = np.sort(np.asarray(values))[::-1][:2]
    np.testing.assert_allclose(pairs.values, truth, rtol=1e-4)
    assert float(pairs.residuals.max()) < 1e-3


@pytest.mark.parametrize(
    ("guess", "message"),
    [
        (jnp.ones(()), "leading axis k >= 1"),
        (jnp.ones((0, 5)), "leading axis k >= 1"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, "one common leading axis"),
        (jnp.ones((6, 5)), "k = 6 vectors of only 5 parameters"),
    ],
)
def test_impossible_guesses_are_named(guess, message):
    with pytest.raises(ValueError, match=message):
        rj.top_eigenpairs(lambda v: v, guess)
