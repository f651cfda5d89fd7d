"""Programs for GPUs and TPUs, lowered here: no host callback, no double precision, no
custom call that the platform lacks."""

import re

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.export import DisabledSafetyCheck, export
from jax.sharding import AbstractMesh

import rodjax as rj
from rodjax.flows import REGISTRY
from rodjax.solve import solving
from rodjax.sweeps._lanes import Spec
from rodjax.sweeps._program import AXIS, Frozen, chunk_of

PLATFORMS = ("cuda", "tpu")
# The platforms' own: an eigensolver for symmetric matrices.
KNOWN = {"cusolver_syevd_ffi", "Eigh", "Qr", "cusolver_geqrf_ffi", "cusolver_orgqr_ffi"}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "adam": optax.adam(0.1),
    "clipped, on a schedule": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)),
    ),
}
START = {"a": [0.1, 0.2, 0.3], "b": [0.3, 0.1]}


@pytest.fixture(autouse=True)
def single_precision():
    """As accelerators are used: in it nothing may ask for double precision."""
    with jax.enable_x64(False):
        yield


def start():
    return {name: jnp.asarray(x, jnp.float32) for name, x in START.items()}


def loss(w):
    weights = jnp.asarray([1.0, 2.0, 3.0], jnp.result_type(w["a"]))
    bent = jnp.sum(w["a"]) ** 2 * w["b"][0]
    return 0.5 * jnp.sum(w["a"] ** 2 * weights) + jnp.sum(jnp.cos(w["b"])) + 0.1 * bent


def assert_lowers(function, *arguments, more=()):
    for platform in PLATFORMS:
        checks = [DisabledSafetyCheck.custom_call(name) for name in more]
        lowered = export(
            jax.jit(function), platforms=[platform], disabled_checks=checks
        )
        text = lowered(*arguments).mlir_module()
        assert set(re.findall(r"custom_call @(\w+)", text)) <= KNOWN | set(more)
        assert "f64" not in text


# One optimizer of each kind quick, and all that take long slow.
QUICK = ("sgd", "adam", "clipped, on a schedule")
PAIRS = [
    pytest.param(name, optimizer, marks=[pytest.mark.slow] * (optimizer not in QUICK))
    for name, record in REGISTRY.items()
    for optimizer in OPTIMIZERS
    if name != "principal"
    and (
        record.serves == "any"
        or optimizer == "sgd"
        or (record.serves == "preconditioned" and optimizer == "rmsprop")
    )
]


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_vector_fields(name, optimizer):
    flow = REGISTRY[name].build(rj.dynamics(OPTIMIZERS[optimizer], loss))
    y = flow.init(start(), lr=None, key=jax.random.key(0))
    assert_lowers(lambda y: flow.vector_field(0.0, y, None), y)


def test_exact_principal_needs_an_eigensolver_that_tpus_lack(monkeypatch):
    flow = rj.flows.principal(rj.dynamics(optax.sgd(0.1), loss))
    few = rj.flows.principal(rj.dynamics(optax.sgd(0.1), loss), rank=2)
    y = few.init(start(), lr=None, key=jax.random.key(0))
    assert_lowers(lambda y: few.vector_field(0.0, y, None), y)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="TPU lacks: give rank=k"):
        flow.init(start(), lr=None, key=jax.random.key(0))


def everything(trajectory):
    return jax.tree.leaves(trajectory)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("central", "rod")]


@pytest.mark.parametrize("name", ["modulated", *SLOW])
def test_integrate_with_every_metric(name):
    dynamics = rj.dynamics(optax.sgd(0.1), loss)
    flow = REGISTRY[name].build(dynamics)
    metrics = [rj.spectrum(dynamics, 2), rj.stability_coefficients(dynamics, 1)]
    solve = lambda w: everything(rj.integrate(flow, w, 8, metrics=metrics))
    assert_lowers(solve, start())


def test_descend_sweep_lanes_and_predictability():
    dynamics = rj.dynamics(optax.adam, loss)
    metrics = [rj.edge_of_stability(dynamics)]
    run = lambda lr: everything(
        rj.descend(dynamics, start(), 8, lr=lr, metrics=metrics)
    )
    assert_lowers(jax.vmap(run), jnp.asarray([0.1, 0.2], jnp.float32))
    limit = lambda lr: everything(rj.predictability(dynamics, start(), 8, lr=lr))
    assert_lowers(jax.vmap(limit), jnp.asarray([0.1, 0.2], jnp.float32))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_sweep_sharded_over_eight_devices_that_are_not_there(platform):
    dynamics = rj.dynamics(optax.sgd, loss)
    spec = Spec(
        dynamics,
        draw=None,
        flows=(("modulated", rj.flows.modulated(dynamics)),),
        warmup=3,
        every=2,
        metrics=(rj.edge_of_stability(dynamics),),
        keep=lambda params: params["a"],
        method=solving(),
        limit=1e3,
        predictability=True,
    )
    params, point = Frozen.of(start()), Frozen.of({"lr": np.zeros((), "float32")})
    mesh = AbstractMesh((8,), (AXIS,))
    program, given = chunk_of(spec, mesh, 16, 3, params, point)
    lowered = export(program, platforms=[platform])(*given)
    text = lowered.mlir_module()
    assert lowered.nr_devices == 8
    assert set(re.findall(r"custom_call @(\w+)", text)) <= KNOWN
    assert "f64" not in text
    # Nothing is ever sent from one to another: each has its own two lanes.
    assert not re.search(
        r"all_gather|all_reduce|all_to_all|collective_|send|recv", text
    )
    assert all(x.shape[0] == 16 for x in lowered.out_avals)


def test_curvature_thresholds_and_watch():
    dynamics = rj.dynamics(optax.adam(0.1), loss)
    state = dynamics.init(start())
    assert_lowers(lambda w: rj.sharpness(loss, w), start())
    # Of a few parameters the matrix is diagonalized.
    bent = lambda w: jnp.sum(jnp.cos(w["a"]) * jnp.sin(w["b"][None]))
    many = {"a": jnp.ones((9, 9), jnp.float32), "b": jnp.ones(9, jnp.float32)}
    assert_lowers(lambda w: rj.sharpness(bent, w), many)
    assert_lowers(lambda w: rj.hessian_eigenpairs(loss, w, 2), start())
    assert_lowers(lambda state: rj.sharpness_ratio(dynamics, state), state)
    assert_lowers(lambda w: rj.threshold(dynamics, w), start())
    names = [q for q in rj.training.QUANTITIES if q not in ("block_sharpness", "share")]
    by = lambda path: path[0].key
    watched = rj.training.watch(optax.adam(0.1), every=2, quantities=names, by=by)

    def step(state, w):
        given = {"value_fn": loss, "probe_fn": loss}
        return watched.update(jax.grad(loss)(w), state, w, **given)

    assert_lowers(step, watched.init(start()), start())


def test_transformations_and_the_complementarity_problem():
    for tx in (rj.transforms.dal(), rj.transforms.edge_gradient_descent(0.1)):
        step = lambda state, w, tx=tx: tx.update(
            jax.grad(loss)(w), state, w, value_fn=loss
        )
        assert_lowers(step, tx.init(start()), start())
    single = lambda *shape: jnp.zeros(shape, jnp.float32)
    assert_lowers(rj.linalg.complementarity, single(2, 2), single(2, 2, 2, 2))


# --- precision of products -----------------------------------------------------------


def network(w):
    x = jnp.tanh(jnp.ones((4, 3), w["a"].dtype) @ w["a"][:, None] * w["b"][None])
    return 0.5 * jnp.mean((x @ w["b"][:, None] - 1.0) ** 2)


def products(function, *arguments, platform):
    """Of every matrix product of a program, whether it is in full precision."""
    text = export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()
    return [
        "[HIGHEST, " in line for line in text.splitlines() if "contracting_dims" in line
    ]


def programs():
    dynamics = rj.dynamics(optax.adam(0.1), network)
    metrics = [rj.spectrum(dynamics, 2)]
    flow = rj.flows.modulated(dynamics)
    yield "descend", lambda w: everything(rj.descend(dynamics, w, 4, metrics=metrics))
    for name, solver in (("Heun", None), ("Tsit5", diffrax.Tsit5())):
        solve = lambda w, s=solver: everything(rj.integrate(flow, w, 4, solver=s))
        yield f"integrate, {name}", solve
    yield "a step", lambda w: dynamics.update(dynamics.init(w))
    yield "sharpness", lambda w: rj.sharpness(network, w)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("name", "program"), list(programs()))
def test_products_are_in_full_precision_unless_jax_is_told(name, program, platform):
    full = products(program, start(), platform=platform)
    assert full and all(full)
    with jax.default_matmul_precision("default"):
        assert not all(products(program, start(), platform=platform))


@pytest.mark.slow
def test_a_sweep_multiplies_in_full_precision():
    from rodjax.sweeps import _program

    seen = []
    text_of = _program.text_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_program, "text_of", lambda x: seen.append(text_of(x)) or seen[0])
        sgd = rj.dynamics(optax.sgd, network)
        rj.sweep(sgd, start(), 2, grid={"lr": [0.1, 0.2]})
    lines = [line for line in seen[0].splitlines() if "contracting_dims" in line]
    assert lines and all("HIGHEST" in line for line in lines)
