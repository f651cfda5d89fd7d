"""Rebuilding the same thing costs no compilation, and another is not taken for it."""

import textwrap
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Traced

import rodjax as rj
from rodjax.optimizer import compiled, fingerprint

W = jnp.array([1.0, -0.5])
EULER = {"solver": diffrax.Euler(), "substeps": 1}


def parabola(w):
    return 0.5 * jnp.sum(w**2)


def traces(*calls):
    """How often each call traces the loss it is given."""
    loss, counts = Traced(parabola), []
    for call in calls:
        before = loss.count
        call(loss)
        counts.append(loss.count - before)
    return counts


# --- rebuilt from equal parts ---------------------------------------------------------

SCHEDULE = lambda: optax.cosine_decay_schedule(0.1, 30)
REBUILT = {
    "adam": lambda: optax.adam(1e-2),
    "schedule": lambda: optax.sgd(SCHEDULE()),
    "warm-up": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0, 0.1, 5, 20)),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
    "masked": lambda: optax.masked(optax.sgd(0.1), True),
    "masked by a function": lambda: optax.masked(
        optax.sgd(0.1), lambda w: jax.tree.map(lambda x: True, w)
    ),
    "multi": lambda: optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.set_to_zero()},
        lambda w: jax.tree.map(lambda x: "a", w),
    ),
    "hyperparameters": lambda: lambda lr: optax.adam(lr, b1=0.8),
    "partial": lambda: partial(optax.sgd, momentum=0.5),
    "scalar": lambda: rj.transforms.scalar_nadam(0.1),
}


@pytest.mark.parametrize("name", REBUILT)
def test_a_rebuilt_optimizer_is_the_same(name):
    lr = 0.1 if name in ("hyperparameters", "partial") else None

    def run(loss):
        # Built each time: a schedule of Optax rewrites its constants in its first use.
        build = lambda: rj.dynamics(REBUILT[name](), loss)
        window = rj.warm_up(build(), W, lr=lr)
        return rj.descend(build(), window, 2, lr=lr)

    first, again = traces(run, run)
    assert first > 1 and again == 0


def test_a_rebuilt_flow_and_an_inline_metric_are_the_same():
    def solve(loss, **options):
        sgd = rj.dynamics(optax.sgd(0.1), loss)
        metrics = [rj.edge_of_stability(sgd), rj.monitor({"size": jnp.max})]
        flow = rj.flows.modulated(sgd, floor=1e-6, **options)
        return rj.integrate(flow, W, 2, metrics=metrics, **EULER)

    first, again, other = traces(solve, solve, partial(solve, degree=1))
    assert first > 0 and again == 0 and other > 0


def test_a_cell_that_is_run_again_compiles_nothing():
    """As in a notebook, whose functions live in one namespace."""
    loss = Traced(parabola)
    space = {"rj": rj, "optax": optax, "jnp": jnp, "loss": loss, "W": W}
    cell = compile(
        textwrap.dedent("""
            adam = rj.dynamics(optax.adam(1e-2), loss)
            ratio = rj.Metric(
                lambda snapshot, *, lr: (),
                lambda snapshot, carry, *, lr: ({"twice": 2 * snapshot.amplitude}, ()),
            )
            run = rj.descend(adam, W, 3, metrics=[ratio])
        """),
        "<cell>",
        "exec",
    )
    counts = []
    for _ in range(3):
        before = loss.count
        exec(cell, space)
        counts.append(loss.count - before)
    assert counts[0] > 1 and counts[1:] == [0, 0]


# --- another --------------------------------------------------------------------------


def end(dynamics, lr=None):
    """Where two steps lead."""
    return rj.warm_up(dynamics, W, 2, lr=lr).at(0).params


def scaled(by):
    return lambda w: by * parabola(w)


def test_another_hyperparameter_is_another_optimizer():
    for rate in (0.1, 0.2, 0.1):
        got = end(rj.dynamics(optax.sgd(rate), parabola))
        np.testing.assert_allclose(got, W * (1 - rate) ** 2, rtol=1e-14)
    first, other, back = traces(
        *(
            lambda loss, b=b: end(rj.dynamics(optax.sgd(0.1, momentum=b), loss))
            for b in (0.5, 0.6, 0.5)
        )
    )
    assert min(first, other) > 0 and back == 0
    # Equal to Python, but not to a loss.
    assert len({fingerprint(scaled(by)) for by in (1, 1.0, True, np.float32(1))}) == 4


def test_another_value_closed_over_is_another_loss():
    for by in (1.0, 3.0, 1.0):
        got = end(rj.dynamics(optax.sgd(0.1), scaled(by)))
        np.testing.assert_allclose(got, W * (1 - 0.1 * by) ** 2, rtol=1e-14)
    # Arrays are told apart by identity: equal ones may differ later, or be large.
    twins = [jnp.array([2.0, 1.0]) for _ in range(2)]
    losses = [lambda w, a=a: jnp.sum(a * w**2) for a in (*twins, twins[0])]
    prints = [fingerprint(loss) for loss in losses]
    assert prints[0] == prints[2] != prints[1]
    for a in (twins[0], jnp.array([1.0, 4.0])):
        got = end(rj.dynamics(optax.sgd(0.1), lambda w, a=a: jnp.sum(a * w**2)))
        np.testing.assert_allclose(got, W * (1 - 0.2 * a) ** 2, rtol=1e-14)


def test_another_code_is_another_loss():
    got = [end(rj.dynamics(optax.sgd(0.1), f)) for f in (parabola, lambda w: w @ w)]
    np.testing.assert_allclose(got[0], W * 0.9**2, rtol=1e-14)
    np.testing.assert_allclose(got[1], W * 0.8**2, rtol=1e-14)


def test_a_global_that_is_bound_anew_is_seen():
    """Read by the loss, by a function that it calls, and by one inside it."""
    space = {"jnp": jnp, "by": 1.0}
    exec(
        textwrap.dedent("""
            def inner(w):
                return by * jnp.sum(w**2)

            def direct(w):
                return by * jnp.sum(w**2)

            def through(w):
                return inner(w)

            def nested(w):
                return (lambda v: by * jnp.sum(v**2))(w)
        """),
        space,
    )
    for by in (1.0, 2.0, 1.0):
        space["by"] = by
        for name in ("direct", "through", "nested"):
            got = end(rj.dynamics(optax.sgd(0.1), space[name]))
            np.testing.assert_allclose(got, W * (1 - 0.2 * by) ** 2, rtol=1e-14)
    # A function that is defined anew, as by a cell that was edited.
    exec("def inner(w):\n    return 0.5 * jnp.sum(w**2)", space)
    got = end(rj.dynamics(optax.sgd(0.1), space["through"]))
    np.testing.assert_allclose(got, W * 0.9**2, rtol=1e-14)


# --- fingerprints ---------------------------------------------------------------------


def nested(a, b):
    def outer(x):
        def inner():
            return a * x + b

        return inner()

    return outer


class Holder:
    def __init__(self, value):
        self.value = value

    def method(self, x):
        return self.value * x


HELD = Holder(2.0)


@pytest.mark.parametrize(
    "build, same",
    [
        (lambda: nested(1.0, "b"), True),
        (lambda: nested(float("nan"), 0), True),
        (lambda: nested({"k": [1, (2, None)]}, {}), True),
        (lambda: nested(scaled(2.0), scaled(2.0)), True),
        (lambda: partial(nested, 1.0, b=2.0), True),
        (lambda: HELD.method, True),
        (lambda: rj.flows.edge(rj.dynamics(optax.sgd, parabola)), True),
        # Objects that say nothing of what they are made of.
        (lambda: nested(object(), 0), False),
        (lambda: Holder(2.0).method, False),
        (lambda: nested(jnp.ones(2), 0), False),
    ],
)
def test_fingerprints_of_what_is_built_twice(build, same):
    prints = [fingerprint(build()) for _ in range(2)]
    assert (prints[0] == prints[1]) is same
    if same:
        assert hash(prints[0]) == hash(prints[1])


def test_fingerprints_tell_defaults_apart_and_end_in_cycles():
    def with_default(value):
        return lambda x=value: x

    assert fingerprint(with_default(1)) == fingerprint(with_default(1))
    assert fingerprint(with_default(1)) != fingerprint(with_default(2))
    assert fingerprint([1, 2]) != fingerprint((1, 2)) != fingerprint((2, 1))

    def cycle():
        def even(n):
            return n == 0 or odd(n - 1)

        def odd(n):
            return n > 0 and even(n - 1)

        return even

    assert fingerprint(cycle()) == fingerprint(cycle())
    # Of two that are shared and of two that only look alike.
    shared = []
    assert fingerprint((shared, shared)) != fingerprint(([], []))


# --- compiled -------------------------------------------------------------------------


def test_compiled_traces_arrays_and_keeps_the_rest():
    count = [0]

    @compiled
    def apply(f, x, n):
        count[0] += 1
        return f(x) * n

    for by, x, n, traced in (
        (2.0, 1.0, 3, 1),
        (2.0, 5.0, 3, 1),
        (2.0, 5.0, 4, 2),
        (3.0, 5.0, 4, 3),
        (2.0, 1.0, 3, 3),
    ):
        assert float(apply(scaled(by), jnp.array([x]), n)) == by * 0.5 * x**2 * n
        assert count[0] == traced


def test_compiled_serves_under_jit_vmap_and_grad():
    @compiled
    def apply(f, x):
        return f(x)

    x = jnp.array([1.0, 2.0])
    each = jax.jit(jax.vmap(jax.grad(lambda x: apply(scaled(2.0), x[None]))))
    np.testing.assert_allclose(each(x), 2.0 * x)
