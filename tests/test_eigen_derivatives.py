"""Derivatives of the largest eigenpairs, simple and multiple."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectra import SPECTRA, basis, matrix, start

import rodjax as rj


@pytest.mark.parametrize(
    ("n", "k"),
    [
        (20, 20),
        (100, 3),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in ((20, 3), (20, 1), (60, 1))
        ),
    ],
)
def test_derivatives_are_those_of_the_dense_decomposition(n, k):
    # Of the 20 parameters the matrix is formed, of the others it is not.
    rng = np.random.default_rng(n + k)
    change = rng.normal(size=(n, n)) / n**0.5
    change = jnp.asarray(change + change.T)
    symmetric = jnp.asarray(matrix("isolated", n))
    weights = jnp.asarray(rng.normal(size=(k, n)))

    def summary(values, rows):
        # A vector has no sign of its own.
        return values @ weights[:, 0], jnp.sum(jnp.sum(weights * rows, 1) ** 2)

    @jax.jit
    def own(t):
        moved = symmetric + t * change
        pairs = rj.top_eigenpairs(lambda v: moved @ v, start(k, n), tol=1e-12)
        nothing = jnp.sum(pairs.residuals)
        return jnp.stack([*summary(pairs.values, pairs.vectors), nothing])

    def dense(t):
        values, vectors = jnp.linalg.eigh(symmetric + t * change)
        return jnp.stack(summary(values[::-1][:k], vectors[:, ::-1][:, :k].T))

    there = jnp.array([0.0, 0.05])
    truth = jax.vmap(jax.jacfwd(dense))(there)
    truth = np.append(truth, np.zeros((2, 1)), 1)
    forwards = jax.jit(jax.vmap(jax.jacfwd(own)))(there)
    np.testing.assert_allclose(forwards, truth, rtol=1e-7, atol=1e-9)
    backwards = jax.jit(jax.jacrev(own))(there[1])
    np.testing.assert_allclose(backwards, truth[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [pytest.param(20, marks=pytest.mark.slow), 60])
def test_derivatives_at_multiple_eigenvalues(n):
    change = np.random.default_rng(n).normal(size=(n, n))
    change = jnp.asarray(change + change.T)
    weight = jax.random.normal(jax.random.key(2), (n, n))

    @jax.jit
    @jax.jacrev
    def slopes_of(t, symmetric):
        moved = symmetric + t * change
        rows = rj.top_eigenpairs(lambda v: moved @ v, start(2, n), tol=1e-12)
        projector = jnp.sum(rows.vectors[:, :, None] * rows.vectors[:, None], 0)
        return jnp.stack([jnp.sum(rows.values), jnp.sum(weight * projector)])

    slopes = lambda name: slopes_of(0.0, jnp.asarray(matrix(name, n)))

    # The eigenspace has a derivative, whatever its basis.
    values, vectors = SPECTRA["double top"](n), basis(n)
    top, rest = vectors[:, -2:], vectors[:, :-2]
    turn = rest / (values[-1] - values[:-2]) @ (rest.T @ change @ top)
    projector = turn @ top.T + top @ turn.T
    expected = np.trace(top.T @ change @ top), np.sum(weight * projector)
    np.testing.assert_allclose(slopes("double top"), expected, rtol=1e-7)
    # Where k cuts through one, or all are equal, nothing that is not finite.
    for name in ("triple top", "all equal", "zero"):
        assert np.all(np.isfinite(slopes(name)))
