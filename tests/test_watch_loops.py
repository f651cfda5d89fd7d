"""`rj.training.watch` in the loops of Flax and Equinox, and its report in logs."""

import json
import struct

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event

from rodjax.training import STATUS, report, watch

X = jax.random.normal(jax.random.key(0), (12, 3))
Y = jax.random.normal(jax.random.key(1), (12, 2))
NAMES = ("update_ratio", "realized_edge", "step_curvature", "sharpness_ratio")


def squares(out, y):
    return 0.5 * jnp.mean(jnp.sum((out - y) ** 2, 1))


def assert_reported(found, words=STATUS[2:]):
    assert all(np.isfinite(x) for x in found.values()), found
    assert STATUS[int(found["status"])] in words


def test_nnx():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
        jax.nn.tanh,
        nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
    )
    by = lambda path: f"layer {path[1].key}"
    tx = watch(optax.adam(0.01), every=2, quantities=NAMES, by=by)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss = lambda model: squares(model(x), y)
        grads = nnx.grad(loss)(model)
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        value_fn = lambda params: loss(nnx.merge(graph, params, rest))
        optimizer.update(model, grads, value_fn=value_fn)

    for _ in range(3):
        step(model, optimizer, X, Y)
    found = report(optimizer)
    assert_reported(found)
    assert found["block_sharpness/layer 0"] > 0
    np.testing.assert_allclose(found["share/layer 0"] + found["share/layer 2"], 1, 1e-5)
    assert report(optimizer.opt_state) == found


def test_train_state():
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), X)["params"]
    loss = lambda params: squares(model.apply({"params": params}, X), Y)
    # What takes the batch's own loss is left out, since this loop passes none.
    tx = optax.chain(watch(optax.adam(0.01), every=2, probe_fn=loss))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    found = report(state)
    known = {name for name, x in found.items() if np.isfinite(x)}
    assert set(found) - known == {"realized_edge", "step_curvature"}
    assert found["sharpness_ratio"] > 0 and found["update_ratio"] > 0
    assert STATUS[int(found["status"])] in STATUS[2:]


@pytest.mark.slow
def test_equinox():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    tx = watch(chain, every=2, quantities=NAMES)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x, y):
        loss = lambda model: squares(jax.vmap(model)(x), y)
        value, grads = eqx.filter_value_and_grad(loss)(model)
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        value_fn = lambda params: loss(eqx.combine(params, rest))
        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return eqx.apply_updates(model, updates), state

    for _ in range(3):
        model, state = step(model, state, X, Y)
    assert_reported(report(state))


# --- loggers --------------------------------------------------------------------------


def trained(log, steps=4):
    """A loop that logs its report."""
    tx = watch(optax.sgd(0.1), every=2, quantities=NAMES)
    loss = lambda w: squares(X @ w, Y)

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w, value=value, value_fn=loss)
        return optax.apply_updates(w, updates), state, value

    w = jnp.ones((3, 2))
    state = tx.init(w)
    for _ in range(steps):
        w, state, value = step(w, state)
        log({"loss": value, **report(state)})
    return report(state)


def test_lines_of_json(tmp_path):
    file = tmp_path / "log.jsonl"

    def log(found):
        numbers = {name: float(x) for name, x in found.items()}
        numbers["status"] = STATUS[int(found["status"])]
        with file.open("a") as lines:
            lines.write(json.dumps(numbers) + "\n")

    last = trained(log)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4 and lines[-1]["step"] == 4
    assert lines[-1]["status"] == STATUS[int(last["status"])]
    assert lines[-1]["sharpness_ratio"] == pytest.approx(last["sharpness_ratio"])


def records(file):
    """The records of a file of TensorBoard: length, checksum, data, checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + size]
        at += 12 + size + 4


def test_a_file_of_tensorboard(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:

        def log(found):
            for name, x in found.items():
                writer.add_scalar(f"watch/{name}", float(x), int(found["step"]))

        last = trained(log)
    (file,) = tmp_path.glob("events.out.tfevents.*")
    written = {}
    for record in records(file):
        event = Event()
        event.ParseFromString(record)
        for value in event.summary.value:
            written[value.tag, event.step] = value.simple_value
    for name, x in last.items():
        assert written[f"watch/{name}", 4] == pytest.approx(float(x), rel=1e-6)
