"""Every public optimizer of Optax, wrappers and chains, and what is made of them.

`python tests/every_optimizer.py` prints the table of the documentation anew.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, tree_leaves_with_path
from optax import contrib

import rodjax as rj
from rodjax.optimizer import merge, split_like, unit_preconditioner

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
CURVATURES = jnp.array([3.0, 1.0])
START = {"a": jnp.array([1.0, -0.7]), "b": jnp.array([0.4])}


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
    adam = optax.adam(lr)
    return optax.multi_transform({"x": ball, "y": adam}, {"a": "x", "b": "y"})


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
        {"x": optax.adam(lr), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd),
    "MultiSteps": lambda lr: optax.MultiSteps(
        optax.sgd(lr), 4
    ).gradient_transformation(),
    "apply_every": lambda lr: optax.chain(optax.apply_every(4), optax.sgd(lr)),
    "clip": lambda lr: optax.chain(optax.clip(1.0), optax.sgd(lr)),
    "clip_by_global_norm": lambda lr: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(lr)
    ),
    "ema": lambda lr: optax.chain(optax.sgd(lr), optax.ema(0.9)),
    "two traces": lambda lr: optax.chain(
        optax.trace(0.5), optax.trace(0.5), optax.sgd(lr)
    ),
    "apply_if_finite": lambda lr: optax.apply_if_finite(optax.adam(lr), 3),
    "zero_nans": lambda lr: optax.chain(optax.zero_nans(), optax.sgd(lr)),
    "schedule": lambda lr: optax.adam(optax.linear_schedule(lr, 0.5 * lr, 100)),
    "schedule table": lambda lr: optax.sgd(table_schedule(lr)),
    "mu_dtype": lambda lr: optax.adam(lr, mu_dtype=jnp.bfloat16),
    "weight decay": lambda lr: optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(lr)
    ),
    "reduce_on_plateau": lambda lr: optax.chain(
        optax.sgd(lr), contrib.reduce_on_plateau()
    ),
    "flatten": lambda lr: optax.flatten(optax.adam(lr)),
    "add_noise": lambda lr: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(lr)
    ),
}
EVERY = PUBLIC | CONTRIB | WRAPPED
#: Which refuse Optax's extra arguments.
TAKES_NO_MORE = {"sam(sgd)"}
#: Those whose learning rate is a factor of a step that they find themselves.
OWN_RATE = {"cocob", "dadapt_adamw", "dog", "dowg", "momo", "momo_adam", "prodigy"}


def build(name, on="quadratic"):
    """The optimizer, and its dynamics on one of the losses."""
    optimizer = EVERY[name](1.0 if name in OWN_RATE else 0.05)
    return optimizer, rj.dynamics(optimizer, LOSSES[on][0])


def plain_loop(name, steps, on="quadratic"):
    """Every iterate of a loop as Optax's documentation writes it."""
    optimizer, _ = build(name)
    loss, start = LOSSES[on]
    update = optax.with_extra_args_support(optimizer).update

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grad, "value_fn": loss}
        extra = {} if name in TAKES_NO_MORE else extra
        updates, state = update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    path = [params]
    for _ in range(steps):
        params, state = step(params, state)
        path.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *path)


def radii(name, curvatures):
    """Spectral radii of Optax's own step at rest on l/2 |w - START|^2, for every l.

    At the state where a threshold is taken: long after the start, second moments such
    that one step without a gradient leaves them at one.
    """
    optimizer, dynamics = build(name)
    state = unit_preconditioner(dynamics, dynamics.init(START))
    none = optax.tree.zeros_like(START)
    update = optax.with_extra_args_support(optimizer).update
    state = state._replace(phase=(START, optax.tree.zeros_like(state.phase[1])))

    def step(phase, slow, grad_of):
        params, inner = merge(state._replace(phase=phase, slow=slow))
        grad = grad_of(params)
        updates, new = update(
            grad, inner, params, value=1.0, grad=grad, value_fn=lambda w: 1.0
        )
        cast = lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype)
        new = jax.tree.map(cast, new, inner)
        return split_like((optax.apply_updates(params, updates), new), state)

    after = step(state.phase, state.slow, lambda _: none).slow
    slow = jax.tree.map(lambda s, a: jnp.where(a > 0, s * s / a, s), state.slow, after)
    at, unravel = jax.flatten_util.ravel_pytree(state.phase)

    @jax.jit
    def jacobian(curvature):
        # Norms have no derivative at rest itself.
        bent = lambda params: jax.tree.map(
            lambda w, w0: curvature * (w - w0) + 1e-18, params, START
        )
        one = lambda x: step(unravel(x), slow, bent).phase
        flat = lambda x: jax.flatten_util.ravel_pytree(one(x))[0]
        return jax.jacfwd(flat)(at)

    return np.array(
        [np.abs(np.linalg.eigvals(np.asarray(jacobian(x)))).max() for x in curvatures]
    )


def first_line(error):
    return str(error).strip().splitlines()[0]


def threshold_of(dynamics):
    """The threshold, or why there is none."""
    try:
        return float(rj.threshold(dynamics, START))
    except ValueError as error:
        return first_line(error)


def carried(flow, start=START):
    """`None`, or why the flow refuses the optimizer."""
    try:
        jax.eval_shape(partial(flow.init, lr=None, key=jax.random.key(0)), start)
    except ValueError as error:
        return first_line(error)
    return None


def parts_of(dynamics):
    """What each part of the state holds, by the names of Optax's fields."""
    state = dynamics.init(START)
    found = {}
    for part, tree in state._asdict().items():
        names = [
            [k.name for k in path if isinstance(k, GetAttrKey)]
            for path, _ in tree_leaves_with_path(tree)
            if path[0].idx == 1
        ]
        found[part] = list(dict.fromkeys(n[-1] for n in names if n))
    return found


def row(name):
    """A line of the documentation's table."""
    _, dynamics = build(name)
    parts = "; ".join(
        f"{part}: {', '.join(fields)}"
        for part, fields in parts_of(dynamics).items()
        if fields
    )
    value, why = threshold_of(dynamics), carried(rj.flows.stable(dynamics))
    value = f"{value:.4g}" if isinstance(value, float) else f"none: {value}"
    return f"| `{name}` | {parts or 'none'} | {value} | {why or 'any'} |"


def table():
    head = "| optimizer | its state | threshold | flows |\n|---|---|---|---|"
    return "\n".join([head, *(row(name) for name in EVERY)])


if __name__ == "__main__":
    print(table())
