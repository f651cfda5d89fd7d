"""The coefficients of Runge-Kutta-Chebyshev methods, of any number of stages."""

import functools

import numpy as np

# Of the published method: it damps what is stiff to about 0.95 of itself.
DAMPING = 2 / 13
# Stages of a method of second order.
FEWEST = 2


@functools.lru_cache
def reaches(most: int) -> np.ndarray:
    """[most + 1]: beta_s, rate times step size that s stages are stable for."""
    found = np.zeros(most + 1)
    for s in range(FEWEST, most + 1):
        w0, _, first, second = _polynomials(s)
        found[s] = (w0 + 1) * second[s] / first[s]
    return found


@functools.lru_cache
def coefficients(most: int) -> np.ndarray:
    """[s, j] -> mu_j, nu_j, mu~_j, b_j T_j(w0), c_j of the method of s stages.

    The last of the method's coefficients is gamma~_j = -(1 - b_{j-1} T_{j-1}) mu~_j.
    Where theta is not one, b_j is divided and w1 multiplied by it: mu~_j becomes theta
    mu~_j for j > 1, and gamma~_j = -(theta - b_{j-1} T_{j-1}) mu~_j.
    """
    table = np.zeros((most + 1, most + 1, 5))
    for s in range(FEWEST, most + 1):
        w0, t, first, second = _polynomials(s)
        w1 = first[s] / second[s]
        b = np.empty(s + 1)
        b[2:] = second[2:] / first[2:] ** 2
        b[:2] = b[2]
        table[s, 1, 2] = b[1] * w1
        for j in range(2, s + 1):
            table[s, j, 0] = 2 * b[j] * w0 / b[j - 1]
            table[s, j, 1] = -b[j] / b[j - 2]
            table[s, j, 2] = 2 * b[j] * w1 / b[j - 1]
            table[s, j, 4] = w1 * second[j] / first[j]
        table[s, 1, 4] = table[s, 2, 4] / (4 * w0)
        table[s, : s + 1, 3] = b * t
    return table


def _polynomials(s: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """w0, and T_j(w0), T_j'(w0), T_j''(w0) for j from 0 to s."""
    w0 = 1 + DAMPING / s**2
    t, first, second = np.zeros((3, s + 1))
    t[:2], first[1] = (1.0, w0), 1.0
    for j in range(2, s + 1):
        t[j] = 2 * w0 * t[j - 1] - t[j - 2]
        first[j] = 2 * t[j - 1] + 2 * w0 * first[j - 1] - first[j - 2]
        second[j] = 4 * first[j - 1] + 2 * w0 * second[j - 1] - second[j - 2]
    return w0, t, first, second
