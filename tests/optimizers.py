"""Every public optimizer of Optax, wrappers and chains, and what they are tried on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

# Not JAX's arrays, whose precision is settled when they are made.
CURVATURES = np.array([3.0, 1.0])
START = {"a": np.array([1.0, -0.7]), "b": np.array([0.4])}


def quadratic(w):
    return 0.5 * jnp.sum(CURVATURES * w["a"] ** 2) + 0.5 * jnp.sum(w["b"] ** 2)


def drawn(seed, *shape):
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


INPUTS, TARGETS = 2 * drawn(0, 12, 3), drawn(1, 12, 2)
LAYERS = {
    "a": {"kernel": drawn(2, 3, 5), "bias": drawn(3, 5)},
    "b": {"kernel": drawn(4, 5, 2), "bias": drawn(5, 2)},
}


def net(w):
    hidden = jnp.tanh(INPUTS @ w["a"]["kernel"] + w["a"]["bias"][None])
    out = hidden @ w["b"]["kernel"] + w["b"]["bias"][None]
    return 0.5 * jnp.mean(jnp.sum((out - TARGETS) ** 2, 1))


#: Of known spectrum, and not: the loss and where it is started from.
LOSSES = {"quadratic": (quadratic, START), "net": (net, LAYERS)}


def table_schedule(lr):
    return lambda count: jnp.linspace(1.0, 0.5, 200)[count] * lr


def labelled(lr):
    ball = optax.sgd(lr, momentum=0.9)
    adam = ADAM(lr)
    return optax.multi_transform({"x": ball, "y": adam}, {"a": "x", "b": "y"})


#: With a memory of ten steps, which is short beside every time here.
ADAM = partial(optax.adam, b2=0.9)
#: Learning rate -> each public optimizer of Optax.
PUBLIC = {
    name: getattr(optax, name)
    for name in [
        "adabelief",
        "adadelta",
        "adafactor",
        "adagrad",
        "adam",
        "adamax",
        "adamaxw",
        "adamw",
        "adan",
        "amsgrad",
        "fromage",
        "lamb",
        "lars",
        "lbfgs",
        "lion",
        "nadam",
        "nadamw",
        "novograd",
        "optimistic_adam_v2",
        "optimistic_gradient_descent",
        "polyak_sgd",
        "radam",
        "rmsprop",
        "rprop",
        "sgd",
        "sign_sgd",
        "signum",
        "sm3",
        "yogi",
    ]
    if hasattr(optax, name)
} | {"noisy_sgd": partial(optax.noisy_sgd, key=jax.random.key(0))}
#: And of `optax.contrib`.
CONTRIB = {
    name: getattr(contrib, name)
    for name in [
        "acprop",
        "ademamix",
        "adopt",
        "cocob",
        "dadapt_adamw",
        "dog",
        "dowg",
        "madgrad",
        "momo",
        "momo_adam",
        "muon",
        "prodigy",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "simplified_ademamix",
    ]
    if hasattr(contrib, name)
} | {
    "mechanize(sgd)": lambda lr: contrib.mechanize(optax.sgd(lr)),
    "sam(sgd)": lambda lr: contrib.sam(optax.sgd(lr), optax.sgd(0.05), sync_period=2),
}
WRAPPED = {
    "heavy ball": lambda lr: optax.sgd(lr, momentum=0.9),
    "nesterov": lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
    "multi_transform": labelled,
    "masked": lambda lr: optax.chain(
        optax.masked(optax.trace(0.9), {"a": True, "b": False}), optax.sgd(lr)
    ),
    "frozen layer": lambda lr: optax.multi_transform(
        {"x": ADAM(lr), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd),
    "MultiSteps": lambda lr: optax.MultiSteps(
        optax.sgd(lr), 4
    ).gradient_transformation(),
    "apply_every": lambda lr: optax.chain(optax.apply_every(4), optax.sgd(lr)),
    "clip": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "clip_by_global_norm": lambda lr: optax.chain(
        optax.clip_by_global_norm(1.0), ADAM(lr)
    ),
    "ema": lambda lr: optax.chain(optax.sgd(lr), optax.ema(0.9)),
    "two traces": lambda lr: optax.chain(
        optax.trace(0.5), optax.trace(0.5), optax.sgd(lr)
    ),
    "apply_if_finite": lambda lr: optax.apply_if_finite(ADAM(lr), 3),
    "zero_nans": lambda lr: optax.chain(optax.zero_nans(), optax.sgd(lr)),
    "schedule": lambda lr: ADAM(optax.linear_schedule(lr, 0.5 * lr, 100)),
    "schedule table": lambda lr: optax.sgd(table_schedule(lr)),
    "mu_dtype": lambda lr: ADAM(lr, mu_dtype=jnp.bfloat16),
    "weight decay": lambda lr: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(lr)
    ),
    "reduce_on_plateau": lambda lr: optax.chain(
        optax.sgd(lr), contrib.reduce_on_plateau()
    ),
    "flatten": lambda lr: optax.flatten(ADAM(lr)),
    "add_noise": lambda lr: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(lr)
    ),
}
EVERY = PUBLIC | CONTRIB | WRAPPED
#: Which refuse Optax's extra arguments.
TAKES_NO_MORE = {"sam(sgd)"}
#: Those whose learning rate is a factor of a step that they find themselves.
OWN_RATE = {"cocob", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy"}
