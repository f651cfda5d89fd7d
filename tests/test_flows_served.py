"""Whom every flow serves and whom it refuses, by the table in contract.py."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from contract import FLOWS, SERVES, begun, built, model, window_of
from helpers import OPTIMIZERS, START, coupled

import rodjax as rj
from rodjax.flows import REGISTRY


# In an order that all workers of the suite agree on.
@pytest.mark.parametrize(
    "optimizer", sorted(set(OPTIMIZERS) - set(SERVES["preconditioned"]))
)
def test_bundle_refuses_momentum(optimizer):
    flow = rj.flows.rod(model(optimizer), rank=2)
    for where in (START, window_of(optimizer)):
        with pytest.raises(ValueError, match="modulated"):
            jax.eval_shape(partial(begun, flow), where, jnp.asarray(0.01))


# Kin of gradient descent and of RMSProp that neither word means.
REFUSED = {
    "clipped": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "decayed": lambda lr: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lr)),
    "signs": optax.sign_sgd,
    "clipped rmsprop": lambda lr: optax.chain(optax.clip(1.0), optax.rmsprop(lr)),
    "adam without momentum": partial(optax.adam, b1=0.0),
}
SCHEDULE = optax.linear_schedule(0.0, 0.1, 10)
STARTS = {
    "gradient descent": rj.flows.gradient_descent_start,
    "preconditioned": rj.flows.preconditioned_start,
}


def refused(name):
    words = rf"^{name} models .*use rodjax\.flows\.stable, rod"
    return pytest.raises(ValueError, match=words)


@pytest.mark.parametrize("serves", STARTS)
def test_who_is_served_and_who_refused(serves):
    def look(optimizer, lr=None):
        dynamics = rj.dynamics(optimizer, coupled)
        return STARTS[serves](dynamics, START, "this", lr=lr)

    for optimizer in (optax.sgd(SCHEDULE), optax.sgd(0.1)):
        chex.assert_trees_all_equal(look(optimizer).params, START)
    for optimizer, build in (OPTIMIZERS | REFUSED).items():
        if optimizer in SERVES[serves]:
            look(build, jnp.asarray(0.01))
        else:
            with refused("this"):
                look(build, jnp.asarray(0.01))


SPECIAL = [name for name in FLOWS if REGISTRY[FLOWS[name].flow].serves != "any"]


@pytest.mark.parametrize("name", SPECIAL)
def test_serves_whom_its_record_says(name):
    record = REGISTRY[FLOWS[name].flow]
    nearest = {"gradient descent": "rmsprop", "preconditioned": "clipped rmsprop"}
    for optimizer in (nearest[record.serves], "clipped"):
        flow = built(name, rj.dynamics((OPTIMIZERS | REFUSED)[optimizer], coupled))
        with refused(record.name):
            begun(flow, START, jnp.asarray(0.01))
    scheduled = built(name, rj.dynamics(optax.sgd(SCHEDULE), coupled))
    jax.eval_shape(partial(begun, scheduled), START, None)


OPTIONS = [
    *(
        (name, {"rank": rank})
        for name, r in REGISTRY.items()
        if r.rank
        for rank in (0, -2)
    ),
    *((name, {"floor": -1e-9}) for name, r in REGISTRY.items() if r.floor),
    ("central", {"gamma": 0.0}),
]


@pytest.mark.parametrize("name, options", OPTIONS)
def test_refuses_bad_options(name, options):
    (option,) = options
    message = f"{option} must be {'positive' if option == 'gamma' else 'at least'}"
    with pytest.raises(ValueError, match=message):
        REGISTRY[name].build(model("sgd"), **options)
