"""Memory of compiled programs, in copies of the parameters, beyond the gradient's."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj

WIDTH, SAMPLES = 120, 4
X = np.random.default_rng(0).normal(size=(SAMPLES, WIDTH))


def loss(params):
    x = X
    for w in params:
        x = jnp.tanh(x @ w)
    return 0.5 * jnp.mean(x**2)


PARAMS = [
    jnp.asarray(w) for w in np.random.default_rng(1).normal(size=(3, WIDTH, WIDTH)) / 11
]
COPY = sum(w.nbytes for w in PARAMS)
SGD = rj.dynamics(optax.sgd(0.1), loss)
NOTHING = lambda params: None


def temporaries(function, *arguments):
    """Of a compiled program, beside what goes in and comes out."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / COPY


OWN = temporaries(jax.grad(loss), PARAMS)


def window(dynamics=SGD):
    return jax.eval_shape(lambda: rj.warm_up(dynamics, PARAMS))


def descended(steps, every, keep=NOTHING):
    run = lambda start: rj.descend(SGD, start, steps, every=every, keep=keep)
    return temporaries(run, window())


@pytest.mark.parametrize("every", [1, 3, 7, 50])
def test_a_run_takes_five_copies(every):
    """The seven states that it ends with are not among them."""
    assert descended(100 * every, every) - OWN < 5


def test_warming_up_moves_no_window():
    more = lambda start: rj.warm_up(SGD, start, 100)
    assert temporaries(more, window()) - OWN < 3


@pytest.mark.parametrize(("name", "most"), [("stable", 4), ("modulated", 10)])
def test_a_flow_takes_as_many_copies_as_it_says(name, most):
    flow = rj.flows.REGISTRY[name].build(SGD)
    start = jax.eval_shape(lambda: rj.integrate(flow, PARAMS, 1).final)
    solve = lambda start, steps, every: rj.integrate(
        flow, start, steps, every=every, keep=NOTHING
    )
    short, long = (
        temporaries(partial(solve, steps=steps, every=every), start)
        for steps, every in ((10, 10), (100_000, 1000))
    )
    assert short - OWN < most
    # What is saved comes out, and nothing else grows with the steps.
    assert long == pytest.approx(short, abs=0.1)


def test_a_run_of_many_steps_takes_what_a_short_one_does():
    assert descended(100_000, 100) == pytest.approx(descended(200, 100), abs=0.1)


# --- Heun's method -------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_heun_is_that_of_diffrax(adaptive):
    controller = diffrax.PIDController(1e-4, 1e-7) if adaptive else None
    field = diffrax.ODETerm(lambda t, y, args: {"a": y["b"] * t, "b": -(y["a"] ** 3)})
    start = {"a": jnp.ones(3), "b": jnp.arange(3.0)}

    def solved(solver):
        return diffrax.diffeqsolve(
            field, solver, 0.0, 3.0, 0.1, start,
            stepsize_controller=controller or diffrax.ConstantStepSize(),
        )  # fmt: skip

    own, other = solved(rj.solve.Heun()), solved(diffrax.Heun())
    assert own.stats["num_steps"] == other.stats["num_steps"]
    close = partial(np.testing.assert_allclose, rtol=1e-12)
    jax.tree.map(close, own.ys, other.ys)


# --- recipes -------------------------------------------------------------------------


def products(function, params):
    """What flows and metrics ask of a loss: a Hessian-vector product."""
    return jax.jvp(jax.grad(function), (params,), (params,))[1]


def test_checkpointed_layers_keep_one_activation_each():
    """In a loop over stacked layers, where no compiler undoes the recomputation."""

    def deep(params, layer):
        x = jnp.broadcast_to(X[:1], (50 * SAMPLES, WIDTH))
        stacked = jnp.concatenate([jnp.stack(params)] * 6)
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, stacked)
        return 0.5 * jnp.mean(x**2)

    layer = lambda x, w: jnp.tanh(jnp.tanh(jnp.tanh(x @ w) * x) + x)
    again = jax.checkpoint(layer, prevent_cse=False)
    plain, light = partial(deep, layer=layer), partial(deep, layer=again)
    for derivative in (jax.grad, lambda f: partial(products, f)):
        much, little = (temporaries(derivative(f), PARAMS) for f in (plain, light))
        assert little < 0.5 * much
    for point, other in zip(
        *(
            rj.descend(rj.dynamics(optax.sgd(0.1), f), PARAMS, 2).ends
            for f in (plain, light)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(point, other, rtol=1e-10)


def test_chunks_bound_the_memory_of_products():
    def chunked(params, samples, chunk):
        data = jnp.broadcast_to(X[:1], (samples, WIDTH))

        def errors(x):
            for w in params:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2, axis=1)

        return rj.problems.chunked_mean(errors, data, chunk=chunk)

    of = lambda samples, chunk: temporaries(
        partial(products, partial(chunked, samples=samples, chunk=chunk)), PARAMS
    )
    few, many = of(40, 20), of(4000, 20)
    data = 8 * WIDTH * 4000 / COPY
    assert few < 6 and many < few + data + 1
    assert of(4000, 4000) > 3 * many
