"""Parameters, losses, optimizers and learning rates that make no dynamics."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import unchecked

import rodjax as rj

KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([[0.3, -0.2], [0.5, 1.0]]), "b": jnp.array([0.1, -0.4])}


def loss(params):
    return jnp.sum(params["a"] ** 4) + jnp.sum(jnp.cos(params["b"]))


ERRORS = {
    "integer params": (lambda: optax.sgd(0.1), {"i": jnp.arange(2)}, r"params\['i'\]"),
    "key in params": (lambda: optax.sgd(0.1), {"k": KEY}, r"params\['k'\]"),
    "empty params": (lambda: optax.sgd(0.1), {}, "params has no leaves"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_unfit_leaf_is_named(name):
    optimizer, params, message = ERRORS[name]
    quadratic = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    with pytest.raises((TypeError, ValueError), match=message):
        rj.dynamics(optimizer(), quadratic).init(params)


@pytest.mark.parametrize(
    "bad",
    [lambda p: p["b"], lambda p: (loss(p), {}), lambda p: jnp.argmax(p["b"])],
    ids=["vector", "auxiliary", "integer"],
)
def test_loss_that_is_no_scalar(bad):
    with pytest.raises(ValueError, match="loss must return one real float"):
        rj.dynamics(optax.sgd(0.1), bad).init(PARAMS)


@pytest.mark.parametrize("optimizer", ["adam", 0.1, None])
def test_optimizer_of_a_wrong_type(optimizer):
    refused = pytest.raises(TypeError, match=f"optimizer.*{type(optimizer).__name__}")
    with unchecked(), refused:
        rj.dynamics(optimizer, loss)


@pytest.mark.parametrize(
    ("optimizer", "lr", "message"),
    [(optax.adam, None, "lr is missing"), (optax.adam(0.1), 0.1, "lr was given")],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda d, lr: d.init(PARAMS, lr=lr),
        lambda d, lr: rj.descend(d, PARAMS, 2, lr=lr),
        lambda d, lr: rj.threshold(d, PARAMS, lr=lr),
    ],
    ids=["init", "descend", "threshold"],
)
def test_lr_missing_or_in_vain(optimizer, lr, message, use):
    with pytest.raises(ValueError, match=message):
        use(rj.dynamics(optimizer, loss), lr)
