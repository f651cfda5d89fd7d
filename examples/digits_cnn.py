"""A Flax CNN on handwritten digits, in a loop of one's own that is watched.

    python examples/digits_cnn.py run        # killed and started again, it goes on
    rodjax inspect run/checkpoints --problem examples/digits_cnn.py:problem \
        --optimizer examples/digits_cnn.py:optimizer --lr 0.1 --forecast 100

Needs `pip install "rodjax[run]"`. Written to the folder: `log.jsonl`, a line of
the report for every ten steps, and checkpoints of orbax.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import rodjax as rj

STEPS, WARMUP, LR = 400, 40, 0.1
SAMPLES, BATCH = 256, 128
LOG, SAVE = 10, 50
DATA = rj.problems.digits(SAMPLES, dtype="float32")


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(64, 16, rngs=rngs)
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.conv(x))
        return self.out(nnx.tanh(self.hidden(x.reshape(len(x), -1))))


graph, start = nnx.split(CNN(nnx.Rngs(0)), nnx.Param)


def loss(params, x, y):
    """Squared error: with cross-entropy the sharpness falls again as it is learned."""
    return 0.5 * jnp.mean(jnp.sum((nnx.merge(graph, params)(x) - y) ** 2, 1))


def problem():
    """All samples: what the run is looked at by."""
    return (lambda params: loss(params, *DATA)), start


def optimizer(lr):
    # Times the learning rate, so that a forecast can have many of them.
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, WARMUP, 2000)
    adam = optax.adamw(lambda n: lr * unit(n), weight_decay=1e-4)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


tx = rj.training.watch(optimizer(LR), every=20, probe_fn=problem()[0])


@jax.jit
def update(params, opt_state, x, y):
    value_fn = lambda params: loss(params, x, y)
    value, grads = jax.value_and_grad(value_fn)(params)
    extra = {"value": value, "value_fn": value_fn}
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state, value


def batch(step):
    """Of the step alone, so that a run that goes on sees the batches it would have."""
    epoch, place = divmod(step - 1, SAMPLES // BATCH)
    order = np.random.default_rng(epoch).permutation(SAMPLES)
    chosen = order[place * BATCH : (place + 1) * BATCH]
    return DATA.inputs[chosen], DATA.targets[chosen]


def train(folder, steps=STEPS):
    """Train from the last checkpoint on, if there is one."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    saved = {"params": start, "opt_state": tx.init(start)}
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        done = manager.latest_step() or 0
        if done:
            saved = manager.restore(done, args=ocp.args.StandardRestore(saved))
        # What was logged after the checkpoint is about to be logged again.
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(lines[: done // LOG]))
        params, opt_state = saved["params"], saved["opt_state"]
        for step in range(done + 1, steps + 1):
            params, opt_state, value = update(params, opt_state, *batch(step))
            if step % LOG == 0:
                found = {"loss": value, **rj.training.report(opt_state)}
                status = rj.training.STATUS[int(found["status"])]
                line = {name: float(x) for name, x in found.items()}
                with log.open("a") as file:
                    file.write(json.dumps(line | {"status": status}) + "\n")
            if step % SAVE == 0:
                saved = {"params": params, "opt_state": opt_state}
                manager.save(step, args=ocp.args.StandardSave(saved))
    return params, opt_state


def main():
    parser = argparse.ArgumentParser(description="A watched CNN on digits.")
    parser.add_argument("folder", type=Path, help="Written to, and gone on from.")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    train(given.folder, given.steps)


if __name__ == "__main__":
    main()
