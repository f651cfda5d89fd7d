"""What a convolution costs in a loop: its gradient, laid out anew or as it is.

A CNN of two convolutions on random images of CIFAR-10's shape, float32: milliseconds
of a gradient by itself, in `jax.lax.scan`, and of a product with the Hessian there. On
CPUs XLA leaves convolutions in loops in the order of axes that derivatives give them.

    python benchmarks/convolutions.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import arguments, head, row, seconds, write
from watch import CNN

from rodjax.optimizer import for_loops

STEPS = 2


def measured(function: Any, params: Any) -> float:
    """Milliseconds, the least of three."""
    run = jax.jit(function).lower(params).compile()
    return 1e3 * min(seconds(lambda: run(params)) for _ in range(4))


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "convolutions.json")
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    images = jax.random.normal(jax.random.key(0), (options.samples, 32, 32, 3))
    model = CNN((16, 32))
    params = model.init(jax.random.key(1), images)
    plain = jax.grad(lambda w: jnp.mean(model.apply(w, images) ** 2))
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    print(head(["ms", "gradient", "in a loop", "product in a loop"]))
    for name, grad in {"as it is": plain, "laid out": for_loops(plain)}.items():
        move = lambda w, _, g=grad: (optax.tree.sub(w, g(w)), None)
        bend = lambda w, _, g=grad: (jax.jvp(g, (w,), (w,))[1], None)
        many = lambda step: lambda w: jax.lax.scan(step, w, None, length=STEPS)[0]
        found = {
            "gradient": measured(grad, params),
            "in a loop": measured(many(move), params) / STEPS,
            "product in a loop": measured(many(bend), params) / STEPS,
        }
        results[name] = found
        print(row([name, *(f"{x:.1f}" for x in found.values())]), flush=True)
    write(options.out, results, indent=2)


if __name__ == "__main__":
    main()
