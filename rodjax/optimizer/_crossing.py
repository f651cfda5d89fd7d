"""At which curvature, and at which angle, a linear map leaves the unit circle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Angles at which a map of more than three slots is looked at, and halvings between two.
ANGLES, HALVINGS = 128, 40
# Where no oscillation can be told from none: cosines of an angle that are as near 1 as
# the dtype's epsilon to this power.
NEAR = 0.42

# Above, and below the line.
Fraction = tuple[Array, Array]


def crossing(
    free: Float[Array, "n n"], response: Float[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""The least curvature at which `free + l * response e_0^T` has |z| = 1, and arg z.

    $\det(zI - A_0 - l\, b e_0^T) = P(z) - l\, Q(z)$ with
    $Q = e_0^T \mathrm{adj}(zI - A_0)\, b$, so an eigenvalue $e^{i\omega}$ asks for
    $l = P/Q$ there, which must be real and positive: at $\omega = \pi$ it always is
    real; elsewhere $\mathrm{Im}(P \bar Q) = \sin\omega \sum_m s_m U_{m-1}(\cos\omega)$
    must vanish, $U$ being Chebyshev's polynomials of the second kind. Infinite, with
    the angle $\pi$, where no curvature does it. In the language of filters this is the
    least gain at a phase crossing (Lee, Lee, arXiv 2608.18415).
    """
    p, q = _polynomials(free, response)
    zero, one = jnp.zeros((), free.dtype), jnp.ones((), free.dtype)
    # By itself, for the other angles have no derivative there.
    at = lambda x: sum((-a if k % 2 else a for k, a in enumerate(x)), zero)
    gain, angle = _positive(at(p), at(q)), jnp.asarray(jnp.pi, free.dtype)
    edge = 1 - float(jnp.finfo(free.dtype).eps) ** NEAR

    def first(so_far: tuple[Array, Array], cosine: Fraction) -> tuple[Array, Array]:
        gain, angle = so_far
        # Not by the quotient: whether a remainder of rounding is zero may be answered
        # differently in one program, and one over the other then is any number.
        top, bottom = cosine
        inside = jnp.abs(top) < edge * jnp.abs(bottom)
        c = jnp.where(inside, top / jnp.where(inside, bottom, 1), 0)
        other = _gain(p, q, c)
        less = inside & (other < gain)
        return jnp.where(less, other, gain), jnp.where(less, jnp.arccos(c), angle)

    if len(q) <= 3:
        # One after the other, so that many coordinates are one pass over them.
        for cosine in _angles(_sines(p, q)):
            gain, angle = first((gain, angle), cosine)
        return gain, angle
    cosines = _searched(_sines(p, q))
    step = lambda so_far, cosine: (first(so_far, (cosine, one)), None)
    return jax.lax.scan(step, (gain, angle), cosines)[0]


def _polynomials(free: Array, response: Array) -> tuple[list[Array], list[Array]]:
    """Coefficients of P, n + 1, and of Q, n, from the constant on (Faddeev).

    Number by number: of many small matrices a product takes far longer than its sums.
    """
    rows = range(len(response))
    one, none = jnp.ones((), free.dtype), jnp.zeros((), free.dtype)
    adjugate = [[one if i == j else none for j in rows] for i in rows]
    dot = lambda x, y: sum((a * b for a, b in zip(x, y, strict=True)), none)
    p, q = [one], []
    for k in range(1, len(rows) + 1):
        q.append(dot(adjugate[0], response))
        columns = list(zip(*adjugate, strict=True))
        image = [[dot(free[i], column) for column in columns] for i in rows]
        p.append(-sum((image[i][i] for i in rows), none) / k)
        adjugate = [
            [image[i][j] + p[-1] if i == j else image[i][j] for j in rows] for i in rows
        ]
    return p[::-1], q[::-1]


def _sines(p: list[Array], q: list[Array]) -> list[Array]:
    """s_m of Im(P conj(Q)) = sum_m s_m sin(m w), for m = 1, ..., n."""
    n = len(q)
    terms = [(j - k, p[j] * q[k]) for j in range(n + 1) for k in range(n) if j != k]
    none = jnp.zeros((), p[0].dtype)
    total = lambda m: sum((x for d, x in terms if d == m), none)
    return [total(m) - total(-m) for m in range(1, n + 1)]


def _angles(s: list[Array]) -> list[Fraction]:
    """Cosines where sum_m s_m U_{m-1}(c) vanishes, as fractions."""
    if len(s) == 1:
        return []
    if len(s) == 2:
        return [(-0.5 * s[0], s[1])]
    # s_1 - s_3 + 2 s_2 c + 4 s_3 c^2, by the root that does not cancel.
    a, b, c = 4 * s[2], s[1], s[0] - s[2]
    square = b * b - a * c
    root = jnp.sqrt(jnp.where(square > 0, square, 0))
    big = -(b + jnp.where(b >= 0, root, -root))
    # No angle, where the roots are not real.
    real = lambda bottom: jnp.where(square >= 0, bottom, 0)
    return [(big, real(a)), (c, real(big))]


def _searched(s: list[Array]) -> Array:
    """The cosines of more than three, on a grid; 1, no angle, where there is none."""

    def value(w):
        sines = jnp.sin(jnp.arange(1, len(s) + 1) * w) / jnp.sin(w)
        return jnp.dot(jnp.stack(s), sines.astype(s[0].dtype))

    grid = jnp.linspace(0, jnp.pi, ANGLES + 1, dtype=s[0].dtype)
    # At the ends themselves nothing tells an angle from none.
    grid = grid.at[0].add(1e-3).at[-1].add(-1e-3)
    low, high = grid[:-1], grid[1:]
    at = jax.vmap(value)
    sign = at(low)
    changes = sign * at(high) < 0

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        left = at(middle) * sign < 0
        return jnp.where(left, low, middle), jnp.where(left, middle, high)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (low, high))
    return jnp.where(changes, jnp.cos(0.5 * (low + high)), 1)


def _gain(p: list[Array], q: list[Array], cosine: Array) -> Array:
    """Re(P conj(Q)) / |Q|^2 at this angle; infinite unless it is positive."""
    waves = [jnp.ones_like(cosine), cosine]
    while len(waves) < len(p):
        waves.append(2 * cosine * waves[-1] - waves[-2])
    pair = lambda a, b: sum(
        (x * y * waves[abs(j - k)] for j, x in enumerate(a) for k, y in enumerate(b)),
        jnp.zeros_like(cosine),
    )
    return _positive(pair(p, q), pair(q, q))


def _positive(above: Array, below: Array) -> Array:
    gain = above / jnp.where(below == 0, 1, below)
    return jnp.where((below != 0) & (gain > 0), gain, jnp.inf)
