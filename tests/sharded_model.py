"""A model over several devices, run by tests in processes of their own."""

import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rodjax as rj

SHAPES = {"a": (24, 40), "b": (40,), "c": (40, 24), "scale": ()}
# Parameters over one axis of the mesh; data over the other.
LAYOUTS = {
    "fsdp": {"a": ("model", None), "b": ("model",), "c": ("model", None), "scale": ()},
    "tensor": {"a": (None, "model"), "b": ("model",), "c": ("model", None)},
}
FLOWS = ("stable", "modulated", "rod", "edge", "central")
DRAWN = ("modulated from parameters", "edge from parameters")


def loss_of(data, shardings=None):
    """With `shardings`, of parameters that the loss itself says where to lie."""

    def loss(w):
        if shardings is not None:
            w = jax.lax.with_sharding_constraint(w, shardings)
        hidden = jnp.tanh(data @ w["a"] + w["b"][None])
        target = jnp.sin(jnp.sum(data, 1, keepdims=True))
        return 10 * jnp.mean((w["scale"] * hidden @ w["c"] - target) ** 2)

    return loss


def problem():
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    params = {name: 0.2 * draw(i, *SHAPES[name]) for i, name in enumerate(SHAPES)}
    return params | {"scale": jnp.ones(())}, draw(9, 8, 24)


def signed(vector):
    """An eigenvector has no sign of its own: the sum of its entries is positive."""
    total = sum(jnp.sum(x) for x in vector.values())
    return jax.tree.map(lambda x: jnp.sign(total) * x, vector)


def cases(loss):
    """Name -> function of the parameters to (trees like them, stacks of such, rest)."""
    sgd = rj.dynamics(optax.sgd(0.2), loss)
    adam = rj.dynamics(optax.adam(0.01), loss)
    watched = rj.training.watch(optax.adam(0.01), every=2, by=lambda path: path[0].key)

    def descend(w):
        run = rj.descend(adam, w, 4, every=2, metrics=[rj.edge_of_stability(adam)])
        last = run.final.at(0)
        inner = last.phase[1][0].mu, last.slow[1][0].nu
        return (last.params, *inner), (run.params,), (run.metrics, run.steps)

    def flow(name):
        dynamics = sgd if name == "central" else adam
        built = getattr(rj.flows, name)(dynamics)

        def solve(w):
            start = rj.warm_up(dynamics, w, 2)
            path = rj.integrate(built, start, 2, every=2, substeps=2)
            state = path.final.state
            mean = getattr(state, "mean", state)
            like, stacks = [mean.params], [path.params]
            if name == "modulated":
                like += state.delta[:1]
            elif name == "edge":
                like += state.direction[:1]
            elif name == "rod":
                stacks += state.extent[:1]
            elif name == "central":
                stacks += [state.directions]
            return like, stacks, path.metrics

        return solve

    def drawn(name):
        built = getattr(rj.flows, name)(adam)

        def solve(w):
            path = rj.integrate(built, w, 2, every=2, substeps=2, key=jax.random.key(7))
            state = path.final.state
            part = state.delta if name == "modulated" else state.direction
            return part[:1], [path.params], {}

        return solve

    def pair(of):
        def solve(w):
            found = of(w)
            return [signed(found.vector)], [], found.value

        return solve

    state = lambda w: adam.update(adam.init(w))

    def several(of):
        def solve(w):
            found = of(w)
            return [], [jax.vmap(signed)(found.vectors)], found.values

        return solve

    def watch(w):
        now = watched.init(w)
        for _ in range(3):
            value, grad = jax.value_and_grad(loss)(w)
            updates, now = watched.update(grad, now, w, value=value, value_fn=loss)
            w = optax.apply_updates(w, updates)
        return (w, *now.directions.values()), [], rj.training.report(now)

    return {
        "descend": descend,
        **{name: flow(name) for name in FLOWS},
        **{name: drawn(name.split()[0]) for name in DRAWN},
        "sharpness": pair(lambda w: rj.sharpness(loss, w)),
        "products": pair(lambda w: rj.sharpness(loss, w, guess=w, products=3)),
        "ratio": pair(lambda w: rj.sharpness_ratio(adam, state(w))),
        "pairs": several(lambda w: rj.hessian_eigenpairs(loss, w, 2)),
        "preconditioned pairs": several(
            lambda w: rj.preconditioned_eigenpairs(adam, state(w), 2)
        ),
        "threshold": lambda w: ([], [], rj.threshold(adam, w)),
        "watch": watch,
    }


def put(tree, shardings):
    """From what every process has, onto the devices of all."""

    def one(x, sharding):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    return jax.tree.map(one, tree, shardings)


def gathered(text, params):
    """Shapes of parameters, or larger ones, that are gathered over devices."""
    found = re.findall(r"= .*?\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    shapes = [tuple(int(n) for n in shape.split(",") if n) for shape in found]
    known = [x.shape for x in jax.tree.leaves(params) if x.ndim]
    most = max(x.size for x in jax.tree.leaves(params))
    bare = lambda shape: tuple(n for n in shape if n > 1)
    return [s for s in shapes if bare(s) in known or np.prod(s) >= most]


def whole(tree):
    """On the host, of all processes together."""
    return multihost_utils.process_allgather(tree, tiled=True)


def check(layout, name, mesh):
    params, data = problem()
    shardings = {
        leaf: NamedSharding(mesh, PartitionSpec(*LAYOUTS[layout].get(leaf, ())))
        for leaf in SHAPES
    }
    # The data are an argument: of several processes no function can close over them.
    said = shardings if layout == "tensor" else None
    solve = lambda w, data, said=said: cases(loss_of(data, said))[name](w)
    expected = jax.jit(lambda *given: solve(*given, None))(params, data)
    w = put(params, shardings)
    x = put(data, NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(solve).lower(w, x).compile()
    assert not gathered(program.as_text(), params), name
    found = program(w, x)
    like, stacks, _ = found
    places = [(tree, ()) for tree in like] + [(tree, (None,)) for tree in stacks]
    for tree, before in places:
        for leaf, values in tree.items():
            spec = PartitionSpec(*before, *shardings[leaf].spec)
            there = values.sharding
            wanted = NamedSharding(mesh, spec)
            same = there.is_equivalent_to(wanted, values.ndim)
            assert same, f"{name}: {leaf} is {there}, not {spec}"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-7, err_msg=name),
        whole(found),
        expected,
    )


def main(layout, *words):
    """The cases by name; or with PORT:PROCESS at the end, that one of two."""
    jax.config.update("jax_enable_x64", True)
    names = [word for word in words if ":" not in word]
    for word in words[len(names) :]:
        port, process = word.split(":")
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=2,
            process_id=int(process),
            coordinator_bind_address=address,
        )
    warnings.simplefilter("ignore")
    assert jax.device_count() == 8
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    for name in names:
        check(layout, name, mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
