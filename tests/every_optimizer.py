"""What is made of every optimizer of Optax: splits, thresholds, refusals, orders.

`python tests/every_optimizer.py` prints the table of the documentation anew.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import apart, heun, order
from jax.tree_util import GetAttrKey, tree_leaves_with_path
from optimizers import EVERY, LOSSES, OWN_RATE, START, TAKES_NO_MORE, quadratic

import rodjax as rj
from rodjax.optimizer import merge, split_like, unit_preconditioner

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)


def build(name, on="quadratic"):
    """The optimizer, and its dynamics on one of the losses."""
    lr = 1.0 if name in OWN_RATE else 0.05
    # Steps ten times as long as Adam's, far too long for a net.
    lr *= 0.1 if (name, on) == ("simplified_ademamix", "net") else 1.0
    optimizer = EVERY[name](lr)
    return optimizer, rj.dynamics(optimizer, LOSSES[on][0])


def plain_loop(name, steps, on="quadratic"):
    """Every iterate of a loop as Optax's documentation writes it."""
    optimizer, _ = build(name, on)
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


# --- orders ---------------------------------------------------------------------------

FLOWS = {"stable": rj.flows.stable, "modulated": rj.flows.modulated}
#: Learning rates, as multiples of the coarsest, and steps there.
SHARES, STEPS = (1.0, 0.5, 0.25), 200
#: More of them where the length of a step settles only slowly.
MORE = {"adadelta": 1000}
#: The coarsest where it is not 1e-3: such that the run gets about as far.
COARSEST = dict.fromkeys(
    [
        *("heavy ball", "masked", "multi_transform", "nesterov", "novograd"),
        "simplified_ademamix",
    ],
    1e-4,
) | {
    "ademamix": 2e-4,
    "frozen layer": 2e-3,
    "lars": 1e-1,
    "madgrad": 1e-6,
    "schedule_free_adamw": 2e-3,
}
EXACT = "exact"
PROMISED = (1, 2)
# The speed of these hardly depends on the gradient, so that the next order comes first.
BETTER = dict.fromkeys(
    [
        *("adam", "adamax", "adamaxw", "adamw", "adan", "ademamix", "adopt"),
        *("apply_if_finite", "clip_by_global_norm", "frozen layer", "muon", "nadam"),
        *("nadamw", "radam", "rmsprop", "schedule_free_adamw", "simplified_ademamix"),
    ],
    (2, 3),
)
#: Orders of the error of the stable and of the modulated flow, or why there are none.
ORDERS = (
    dict.fromkeys(EVERY, PROMISED)
    | BETTER
    | dict.fromkeys(["clip", "sign_sgd", "signum"], (EXACT, EXACT))
    | {"lion": (1, EXACT), "flatten": (2, None), "momo": (1, None)}
    | {"momo_adam": (2, None)}
    | dict.fromkeys(
        ["acprop", "adabelief"],
        "divides by the deviation of the gradient from its mean, which vanishes with "
        "the learning rate",
    )
    | dict.fromkeys(
        ["cocob", "dadapt_adamw", "mechanize(sgd)", "prodigy"],
        "finds the length of its steps on the way, whatever the learning rate",
    )
    | {
        # Its memory is a share of all steps so far, and so never short.
        "adafactor": (1, 1.7),
        "madgrad": "its rate rises with the steps taken, whatever time they make up",
        "mu_dtype": "first moments in half precision",
        "schedule": "a schedule in single precision",
        "yogi": "moves its second moment by a sign",
    }
)


def remembering_little(name):
    """The factory, its decays at most 0.9: a memory of ten steps, short beside time."""
    build = EVERY[name]
    if name == "inject_hyperparams":
        return build
    given = inspect.signature(build).parameters
    long = lambda x: isinstance(x, float) and 0.9 < x < 1
    changed = {k: 0.9 for k, p in given.items() if long(p.default)}
    changed |= {k: (0.9, 0.9) for k in given if k == "betas"}
    return partial(build, **changed)


def orders(name):
    """Flow -> order of its error, relative to the way that the run has gone.

    `EXACT` where the error is rounding, `None` where the flow refuses a window.
    """
    dynamics = rj.dynamics(remembering_little(name), quadratic)
    # Far from where gradients change sign.
    start = optax.tree.scale(4.0, START)
    rates = [COARSEST.get(name, 1e-3) * share for share in SHARES]
    counts = [round(MORE.get(name, STEPS) / share) for share in SHARES]

    @jax.jit
    def walk(window, lr, count):
        one = lambda _, window: rj.warm_up(dynamics, window, 1, lr=lr)
        return jax.lax.fori_loop(0, count, one, window)

    begins, ends = [], []
    for lr, count in zip(rates, counts, strict=True):
        # Until the transients of every memory are over.
        opening = rj.warm_up(dynamics, start, lr=lr)
        begins.append(walk(opening, lr, 2 * count))
        ends.append(walk(begins[-1], lr, count))

    found = {}
    for flow_name, build_flow in FLOWS.items():
        flow = build_flow(dynamics)
        begin = jax.jit(lambda w, lr, f=flow: f.init(w, lr=lr, key=jax.random.key(0)))
        solve, errors = heun(flow), []
        for window, end, lr, count in zip(begins, ends, rates, counts, strict=True):
            try:
                # In one dtype, where moments have a narrower one.
                y = optax.tree.cast(begin(window, lr), float)
                y = solve(y, lr, 4 * count)
            except ValueError:
                break
            way = apart(window.at(0).params, end.at(0).params)
            off = apart(flow.centre(y).params, rj.midpoint(end).params)
            errors.append(off / way if way else np.nan)
        found[flow_name] = order_of(errors)
    return found


def order_of(errors):
    if not errors:
        return None
    # What is not followed at all has no order; written so that NaN is not.
    if not (min(errors) > 0 and max(errors) < 0.1):
        return np.nan
    return EXACT if max(errors) < 1e-9 else order(SHARES, errors)


def told(name):
    """What the documentation says of the orders."""
    expected = ORDERS[name]
    if isinstance(expected, str):
        return f"none: {expected}"
    return ", ".join("no window" if x is None else str(x) for x in expected)


# --- the table ------------------------------------------------------------------------


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
    last = f"{why} | -" if why else f"any | {told(name)}"
    return f"| `{name}` | {parts or 'none'} | {value} | {last} |"


def table():
    head = (
        "| optimizer | its state | threshold | flows | orders |\n|---|---|---|---|---|"
    )
    return "\n".join([head, *(row(name) for name in EVERY)])


if __name__ == "__main__":
    print(table())
