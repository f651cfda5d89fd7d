"""What test modules share: optimizers, toy losses, bare solvers, counts, distances.

Only what two modules use; no test module imports another.
"""

import dataclasses
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import config as checks

from rodjax.transforms import scalar_adam, scalar_nadam, scalar_rmsprop

# --- checks of annotations ------------------------------------------------------------


@contextmanager
def unchecked():
    """Without them: for arguments that the library itself is to refuse."""
    checks.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        checks.update("jaxtyping_disable", False)


# --- optimizers -----------------------------------------------------------------------

#: Learning rate -> each of the nine that the flows are tested with.
OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "nadam": optax.nadam,
    "scalar_rmsprop": scalar_rmsprop,
    "scalar_adam": scalar_adam,
    "scalar_nadam": scalar_nadam,
}

# --- toy losses -----------------------------------------------------------------------

#: Where the coupled loss is started from.
START = {"a": jnp.array([0.8, -0.6, 0.9]), "b": jnp.array(1.1)}


def coupled(params):
    """Smooth, coupled, not quadratic, of two leaves of different rank."""
    a, b = params["a"], params["b"]
    curvature = jnp.array([2.0, 0.7, 0.2], a.dtype)
    return 0.5 * a @ (curvature * a) + jnp.cosh(jnp.sum(a) - b) + 0.1 * b**4


class Cycle(NamedTuple):
    """Iterates that jump between x = c + d, y = m + k and x = c - d, y = m - k."""

    c: float
    d: float
    m: float
    k: float


def berthier_cycle(eta, eps, zeta):
    """The cycle of two steps that gradient descent keeps on Berthier's example.

    Of the four equations three give k = eta c d / 2, c^2 + d^2 = 2 eps and
    m = 2 / eta - 3 zeta c - eta c^2 / 2; the fourth is cubic in c.
    """
    roots = np.roots([-eta, -3 * zeta, 2 / eta + eta * eps, eps * (3 * zeta - 1)])
    c = float(min(roots[abs(roots.imag) < 1e-12].real, key=abs))
    d = (2 * eps - c**2) ** 0.5
    return Cycle(c, d, 2 / eta - 3 * zeta * c - eta * c**2 / 2, eta * c * d / 2)


class Traced:
    """A loss that counts how often it is traced, or called outside of a trace."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, params):
        self.count += 1
        return self.loss(params)


class Counted:
    """A loss that counts its evaluations, under vmap one for each of the batch."""

    def __init__(self, loss):
        self.loss, self.count = loss, 0

    def __call__(self, params):
        entry = jax.tree.leaves(params)[0].ravel()[0]
        jax.debug.callback(self._tick, entry)
        return self.loss(params)

    def _tick(self, _):
        self.count += 1

    def spent(self, function, *args):
        """The evaluations that a call makes."""
        jax.effects_barrier()
        before = self.count
        jax.block_until_ready(function(*args))
        jax.effects_barrier()
        return self.count - before


# --- flows and solvers ----------------------------------------------------------------


def started(flow, y):
    """The flow, beginning at this state whatever it is given."""
    return dataclasses.replace(flow, init=lambda start, *, lr, key: y)


def field(flow, y, lr=None):
    """The vector field at a state."""
    return jax.jit(flow.vector_field)(0.0, y, lr)


# How far ahead along the last rate each stage looks, and how much its own rate counts.
EULER = [0.0], [1.0]
HEUN = [0.0, 1.0], [0.5, 0.5]
RUNGE_KUTTA = [0.0, 0.5, 0.5, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]


def advanced(flow, y, lr, method, substeps, count):
    """The state after so many substeps, by an explicit method.

    A bare loop, over stages too: it compiles far quicker than diffrax, and refuses a
    field that is not like its state.
    """
    h = 1.0 / substeps
    dtype = jnp.result_type(*jax.tree.leaves(y))
    stages = tuple(h * jnp.asarray(numbers, dtype) for numbers in method)

    def substep(_, y):
        def stage(carry, numbers):
            (rate, end), (reach, weight) = carry, numbers
            rate = flow.vector_field(0.0, optax.tree.add_scale(y, reach, rate), lr)
            return (rate, optax.tree.add_scale(end, weight, rate)), None

        return jax.lax.scan(stage, (optax.tree.zeros_like(y), y), stages)[0][1]

    return jax.lax.fori_loop(0, count, substep, y)


def heun(flow, substeps=4):
    """(y, lr, n) -> y after n substeps of Heun's method, compiled."""
    return jax.jit(lambda y, lr, n: advanced(flow, y, lr, HEUN, substeps, n))


def walk(flow, y, steps, *, lr=None, method=HEUN, substeps=4):
    """The states at whole steps, this one the first, stacked."""

    def step(y, _):
        return advanced(flow, y, lr, method, substeps, substeps), y

    end, states = jax.lax.scan(step, y, None, steps)
    return jax.tree.map(lambda x, e: jnp.concatenate([x, e[None]]), states, end)


def runge_kutta(flow, start, steps, *, lr, substeps=32):
    """The states at whole steps from 1 on, from scratch, by the method of order 4."""
    y = flow.init(start, lr=lr, key=jax.random.key(0))
    path = walk(flow, y, steps, lr=lr, method=RUNGE_KUTTA, substeps=substeps)
    return lane(path, slice(1, None))


# --- trees, distances, orders ---------------------------------------------------------


def lane(tree, index):
    """One entry along the leading axis of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def apart(a, b):
    """Distance of two pytrees."""
    return float(optax.tree.norm(optax.tree.sub(a, b)))


def unlike(a, b):
    """Relative distance of two pytrees."""
    return apart(a, b) / float(optax.tree.norm(b))


def order(sizes, errors):
    """The power by which errors go with sizes, by regression."""
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@lru_cache
def _hessian(loss):
    def hessian(params):
        flat, unravel = ravel_pytree(params)
        return jax.hessian(lambda x: loss(unravel(x)))(flat)

    return jax.jit(hessian)


def dense_hessian(loss, params):
    """The Hessian on the ravelled parameters."""
    return np.asarray(_hessian(loss)(params))
