"""Symmetric matrices with a prescribed decomposition."""

from functools import cache

import jax
import numpy as np

bulk = np.linspace

# n -> eigenvalues, ascending.
SPECTRA = {
    "isolated": lambda n: np.append(bulk(-0.1, 1.0, n - 5), [2.0, 2.5, 3.0, 3.5, 4.0]),
    "close top pair": lambda n: np.append(bulk(0.1, 0.9, n - 2), [1.0, 1.001]),
    "close cluster": lambda n: np.append(
        bulk(0.1, 0.9, n - 5), 1.0 + 1e-3 * np.arange(5)
    ),
    "double top": lambda n: np.append(bulk(0.1, 0.9, n - 2), [2.0, 2.0]),
    "triple top": lambda n: np.append(bulk(0.1, 0.9, n - 3), [2.0, 2.0, 2.0]),
    # Of multiplicity beyond any k here.
    "eightfold top": lambda n: np.append(bulk(0.1, 0.9, n - 8), np.full(8, 2.0)),
    # The largest in size is -10: a power iteration would find that one.
    "negative bulk": lambda n: np.append(bulk(-10.0, -0.1, n - 5), [0.1, 1, 2, 3, 4]),
    "all negative": lambda n: np.append(bulk(-10.0, -2.0, n - 1), -0.1),
    "rank three": lambda n: np.append(np.zeros(n - 3), [1.0, 2.0, 3.0]),
    "small top": lambda n: np.concatenate([[-5.0], np.zeros(n - 2), [1e-3]]),
    "rank one": lambda n: np.append(np.zeros(n - 1), 4.0),
    "all equal": lambda n: np.full(n, 3.0),
    "zero": np.zeros,
}


@cache
def basis(n):
    return np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))[0]


@cache
def matrix(name, n):
    return basis(n) * SPECTRA[name](n) @ basis(n).T


def start(k, n, dtype="float64"):
    """Guesses for k eigenvectors."""
    return jax.random.normal(jax.random.key(1), (k, n), dtype)
