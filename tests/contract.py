"""The contract's table: what is expected of every flow, and on which optimizers."""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import OPTIMIZERS, START, coupled

import rodjax as rj
from rodjax.flows import REGISTRY
from rodjax.optimizer import REACH


class Row(NamedTuple):
    """What is expected of a flow, written down apart from it.

    - `state`: the class of its state.
    - `evaluations`, `products`: in one call of the vector field, as it says of itself.
    - `offset`: 1/2 where its centre is the half-step midpoint.
    - `exact`: whether it is gradient descent at whole steps on any quadratic.
    """

    state: type
    evaluations: int = 1
    products: float = 0
    offset: float = 0.0
    exact: bool = False


#: One row for every flow of the registry.
ROWS = {
    "stable": Row(rj.State),
    "rod": Row(rj.flows.RodState, evaluations=4, offset=0.5),
    "modulated": Row(rj.flows.ModulatedState, evaluations=4),
    "edge": Row(rj.flows.EdgeState, evaluations=2, products=1),
    "central": Row(rj.flows.CentralState, products=math.nan),
    "covariance": Row(rj.flows.CovarianceState, products=9),
    "gradient": Row(rj.State),
    "igr": Row(rj.State, products=1),
    "third_order": Row(rj.State, products=3),
    "principal": Row(rj.flows.PrincipalState, products=math.nan, exact=True),
}
# Whom a record's word means.
SERVES = {
    "any": tuple(OPTIMIZERS),
    "preconditioned": ("sgd", "rmsprop", "scalar_rmsprop"),
    "gradient descent": ("sgd",),
}


class Variant(NamedTuple):
    """A flow of the registry with options, and the optimizers that it is tried on."""

    flow: str
    options: dict[str, Any]
    serves: tuple[str, ...] = ("sgd", "adam")


VARIANTS = {
    "rod plain": Variant("rod", {"order": 1}),
    "bundle": Variant("rod", {"rank": 3}, SERVES["preconditioned"]),
    "bundle plain": Variant("rod", {"rank": 3, "order": 1}, ("sgd",)),
    # The oracle, and less correction, see the optimizer as the others do.
    "dense": Variant("rod", {"dense": True}),
    "dense plain": Variant("rod", {"dense": True, "order": 1}),
    "modulated plain": Variant("modulated", {"degree": 1}),
    "modulated cubic": Variant("modulated", {"degree": 3}),
    "principal top": Variant("principal", {"rank": 2}, ("sgd",)),
}
FLOWS = {
    name: Variant(name, {}, SERVES[record.serves]) for name, record in REGISTRY.items()
} | VARIANTS
PAIRS = [(name, optimizer) for name in FLOWS for optimizer in FLOWS[name].serves]
# Where all that a flow serves would take long, the optimizers of the quick suite.
QUICK = {
    "stable": ("sgd", "adam", "scalar_rmsprop"),
    "rod": ("sgd", "adam"),
    "rod plain": ("sgd",),
    "bundle": ("rmsprop",),
    "dense": ("adam",),
    "dense plain": ("sgd",),
    "modulated": ("sgd", "nadam"),
    "modulated plain": ("adam",),
    "modulated cubic": ("nadam",),
    "edge": ("sgd", "nadam"),
    "central": ("sgd",),
}
DTYPES = jnp.dtype("float32"), jnp.dtype("float64")
KEY = jax.random.key(3)
RATES = jnp.array([0.002, 0.005, 0.01])


def slow_but(quick, pairs):
    """The pairs as parameters, slow unless they are among the quick."""
    return [
        pair if quick(*pair) else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in pairs
    ]


table = pytest.mark.parametrize(
    "name, optimizer",
    slow_but(lambda name, optimizer: optimizer in QUICK.get(name, OPTIMIZERS), PAIRS),
)


@lru_cache
def model(optimizer):
    return rj.dynamics(OPTIMIZERS[optimizer], coupled)


def built(name, dynamics):
    return REGISTRY[FLOWS[name].flow].build(dynamics, **FLOWS[name].options)


@lru_cache
def flow_of(name, optimizer):
    return built(name, model(optimizer))


def start(dtype):
    return optax.tree.cast(START, dtype)


@lru_cache
def window_of(optimizer, dtype=DTYPES[1]):
    """A window that alternates and drifts; no run is compiled for it."""
    zero = model(optimizer).init(start(dtype), lr=0.005)

    def at(ahead):
        swing = 1e-3 * ((-1.0) ** ahead + 0.1 * ahead)
        return zero._replace(
            phase=jax.tree.map(lambda x: x + swing, zero.phase),
            slow=optax.tree.full_like(zero.slow, 0.1 + swing),
            clock=jax.tree.map(lambda x: x + 10 + ahead, zero.clock),
        )

    states = rj.flows.stack(*(at(k) for k in range(-REACH, REACH + 1)))
    return rj.Window(states, jnp.asarray(10))


def begun(flow, where, lr):
    return flow.init(where, lr=lr, key=KEY)


@lru_cache
def state_of(name, optimizer):
    """A state of the flow, on numbers."""
    # With momentum what the modulated flow makes of a window takes long to compile.
    where = START if FLOWS[name].flow == "modulated" else window_of(optimizer)
    return jax.jit(partial(begun, flow_of(name, optimizer)))(where, RATES[0])


@lru_cache
def shapes_of(name, optimizer, dtype, scratch):
    """Shapes and dtypes of the state, its rate, and what is observed there."""
    flow = flow_of(name, optimizer)

    def look(where, lr):
        y = begun(flow, where, lr)
        return y, flow.vector_field(0.0, y, lr), flow.observe(y, lr=lr)

    where = start(dtype) if scratch else window_of(optimizer, dtype)
    # Gradient descent promotes no dtype by itself, so neither may a flow.
    promotion = "strict" if optimizer == "sgd" else "standard"
    with jax.numpy_dtype_promotion(promotion):
        return jax.eval_shape(look, where, jnp.asarray(0.1, dtype))
