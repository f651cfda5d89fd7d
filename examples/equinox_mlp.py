"""An Equinox MLP, watched, and where a flow says that it goes from a checkpoint on.

    python examples/equinox_mlp.py equinox_mlp.png

Needs `pip install "rodjax[run]"`. Gradient descent on all samples at once: this is what
flows model, so that here, other than with mini-batches, they can be held to their word.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import rodjax as rj

LR = 0.6
DATA = rj.problems.digits(100, dtype="float32")
model = eqx.nn.MLP(64, 10, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
start, static = eqx.partition(model, eqx.is_inexact_array)


def loss(params):
    out = jax.vmap(eqx.combine(params, static))(DATA.inputs.reshape(-1, 64))
    return 0.5 * jnp.mean(jnp.sum((out - DATA.targets) ** 2, 1))


optimizer = optax.sgd(LR)
tx = rj.training.watch(optimizer, every=5)


@eqx.filter_jit
def update(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    extra = {"value": value, "value_fn": loss}
    updates, opt_state = tx.update(grads, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state, value


def main(picture, before=80, after=160):
    params, opt_state, losses, ratios = start, tx.init(start), [], []
    checkpoint = params, opt_state
    for step in range(before + after):
        if step == before:
            checkpoint = params, opt_state
        params, opt_state, value = update(params, opt_state)
        losses.append(float(value))
        ratios.append(float(rj.training.report(opt_state)["sharpness_ratio"]))
    found = rj.training.report(opt_state)
    print(f"step {before + after}: {rj.training.STATUS[int(found['status'])]}")

    # From the checkpoint on, without the loop.
    dynamics = rj.dynamics(optimizer, loss)
    window = rj.training.window(dynamics, *checkpoint, step=before)
    edge = [rj.edge_of_stability(dynamics)]
    build = {"stable": rj.flows.stable, "modulated": rj.flows.modulated}
    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    upper.semilogy(losses, color="0.6", label="the loop")
    lower.plot(ratios, color="0.6", label="the loop, as watch reports it")
    for name, flow in build.items():
        steps = after - 4
        path = rj.integrate(flow(dynamics), window, steps, every=4, metrics=edge)
        upper.semilogy(path.steps, path.metrics["mean_loss"], label=f"{name} flow")
        lower.plot(path.steps, path.metrics["sharpness_ratio"], label=f"{name} flow")
        end = float(path.metrics["mean_loss"][-1])
        print(f"{name} flow: loss {end:.4g} at step {float(path.steps[-1]):g}")
    print(f"the loop: loss {losses[-1]:.4g}")
    lower.axhline(1, color="k", linestyle=":")
    lower.set(xlabel="step", ylabel="sharpness over threshold")
    upper.set(ylabel="loss")
    lower.legend()
    figure.savefig(picture, dpi=120)
    return losses, ratios


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "equinox_mlp.png")
