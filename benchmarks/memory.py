"""What every flow and function takes of memory, in copies of the parameters.

Of an MLP and a small transformer of 10^4, 10^6 and 10^7 parameters, in float32: the
arrays that XLA holds while a compiled program runs, beside what goes in and comes out
(`memory_analysis().temp_size_in_bytes`), less those of the gradient of the loss, over
the size of the parameters. Of `descend` and `integrate` the window of seven states,
or the flow's state, goes in and comes out. Nothing is kept of the parameters. With
`--rss` also the greatest memory of a process that runs the program once, less that of
one that computes the gradient once, on Linux. What the file holds of other models,
sizes and programs stays there, so that a run in parts makes one table.

    python benchmarks/memory.py
    python benchmarks/memory.py --sizes 1e4,1e6 --models mlp --rss
    python benchmarks/memory.py --sizes 1e7 --programs "sharpness|modulated"
"""

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _common import arguments, head, row, words, write
from accelerator import network

import rodjax as rj
from rodjax.flows import REGISTRY

SIZES = {"1e4": 10**4, "1e6": 10**6, "1e7": 10**7}
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(1e-3)}
STEPS = 8
LANES = 4
# Of which only that of a few directions is for so many parameters.
BUILDS = {name: record.build for name, record in REGISTRY.items()}
BUILDS["principal"] = partial(rj.flows.principal, rank=2)
Program = tuple[Callable[..., Any], Any]


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "benchmarks/results/memory.json")
    parser.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--programs", default="", help="those that this is found in")
    parser.add_argument("--rss", action="store_true", help="of processes, too")
    parser.add_argument("--one", help="run one program, and print the memory it took")
    options = parser.parse_args()
    if options.one:
        print(once(*words(options.one)))
        return
    found = begun(options.out)
    for model in words(options.models):
        for size in words(options.sizes):
            own = found.setdefault(model, {}).setdefault(size, {})
            for name, figures in measured(model, size, options):
                own[name] = figures
                write(options.out, found, indent=1)


def begun(file: Path) -> dict[str, Any]:
    """What the file holds already, of this version of JAX and this backend."""
    here = {"jax": jax.__version__, "backend": jax.default_backend()}
    found = json.loads(file.read_text()) if file.exists() else here
    if there := {key: found[key] for key in here if found[key] != here[key]}:
        sys.exit(f"{file} was measured with {there}: give another file as --out")
    return found


def measured(
    model: str, size: str, options: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """The rows of the table of one model, each printed as it is there."""
    loss, params = MODELS[model](SIZES[size])
    count = sum(x.size for x in jax.tree.leaves(params))
    bytes_of = 4 * count
    gradient = temporaries(jax.grad(loss), params) / bytes_of
    print(f"\n{model}, {count} parameters, gradient's own: {gradient:.2f} copies\n")
    print(head(["program", "copies", *(["process"] if options.rss else [])]))
    yield "parameters", count
    yield "gradient_own", gradient
    for name, program in programs(loss, params).items():
        if not re.search(options.programs, name):
            continue
        try:
            function, start = program()
            copies = temporaries(function, start) / bytes_of - gradient
            copies = copies / LANES if "lanes" in name else copies
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"[:200]
            print(row([name, failed[:60]]), flush=True)
            yield name, {"failed": failed}
            continue
        figures = {"copies": copies}
        cells = [name, f"{copies:.1f}"]
        if options.rss:
            own, base = (process(model, size, x) for x in (name, "gradient"))
            figures["process"] = (own - base) / bytes_of
            cells.append(f"{figures['process']:.1f}")
        print(row(cells), flush=True)
        yield name, figures
        jax.clear_caches()


def temporaries(function: Callable[..., Any], start: Any) -> float:
    """Bytes that a compiled program holds beside what goes in and comes out."""
    analysis = jax.jit(function).lower(start).compile().memory_analysis()
    assert analysis is not None
    return float(analysis.temp_size_in_bytes)


def programs(loss: Any, params: Any) -> dict[str, Callable[[], Program]]:
    """By name, what makes a function of one argument, and the shapes of that."""
    made: dict[str, Callable[[], Program]] = {
        "gradient": lambda: (jax.grad(loss), params)
    }
    for name, optimizer in OPTIMIZERS.items():
        dynamics = rj.dynamics(optimizer, loss)
        own = {what: partial(make, dynamics, optimizer) for what, make in RUNS.items()}
        for flow, record in REGISTRY.items():
            if record.serves == "any" or name == "sgd":
                own[flow] = partial(solved, BUILDS[flow], dynamics)
        made |= {f"{what}, {name}": partial(make, params) for what, make in own.items()}
    made["sharpness"] = lambda: (lambda w: rj.sharpness(loss, w).value, params)
    made[f"sweep of {LANES} lanes, for each"] = lambda: lanes(loss, params)
    made["watch at a probe, adam"] = lambda: watched(loss, params)
    return made


def window(dynamics: rj.Dynamics, params: Any) -> Any:
    """The shapes of a window."""
    return jax.eval_shape(lambda w: rj.warm_up(dynamics, w), params)


def descended(dynamics: rj.Dynamics, params: Any, *metrics: rj.Metric) -> Program:
    """`descend` from a window on."""
    common: dict[str, Any] = {"every": STEPS, "keep": lambda w: None}
    run = lambda start: rj.descend(dynamics, start, STEPS, metrics=metrics, **common)
    return run, window(dynamics, params)


def plain(dynamics: rj.Dynamics, optimizer: Any, params: Any) -> Program:
    """Optax alone, in a scan, its state going in and coming out."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(dynamics.loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    run = lambda start: jax.lax.scan(step, start, length=STEPS)[0]
    return run, (params, jax.eval_shape(optimizer.init, params))


def solved(build: Any, dynamics: rj.Dynamics, params: Any) -> Program:
    """`integrate`, from where the flow has got to on."""
    flow = build(dynamics)
    start = jax.eval_shape(lambda w: rj.integrate(flow, w, 1).final, params)
    common: dict[str, Any] = {"every": STEPS, "keep": lambda w: None}
    return lambda start: rj.integrate(flow, start, STEPS, **common), start


def lanes(loss: Any, params: Any) -> Program:
    """`descend` at several learning rates, vmapped as a sweep does it."""
    dynamics = rj.dynamics(optax.sgd, loss)
    common: dict[str, Any] = {"every": STEPS, "keep": lambda w: None}
    one = lambda w, lr: rj.descend(dynamics, w, STEPS, lr=lr, **common)
    each = jax.vmap(one, in_axes=(None, 0))
    return lambda start: each(*start), (params, jnp.linspace(0.01, 0.1, LANES))


def watched(loss: Any, params: Any) -> Program:
    """One step of a training loop that is watched at every step."""
    tx = rj.training.watch(optax.adam(1e-3), every=1)

    def step(start):
        params, state = start
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step, (params, jax.eval_shape(tx.init, params))


RUNS: dict[str, Callable[..., Program]] = {
    "Optax": plain,
    "descend": lambda dynamics, _, params: descended(dynamics, params),
    "edge_of_stability": lambda dynamics, _, params: descended(
        dynamics, params, rj.edge_of_stability(dynamics)
    ),
    "spectrum of 3": lambda dynamics, _, params: descended(
        dynamics, params, rj.spectrum(dynamics, 3)
    ),
}


def mlp(size: int) -> tuple[Any, Any]:
    """That of `accelerator.py`."""
    return network(size)


def attention(size: int) -> tuple[Any, Any]:
    """A vision transformer of two blocks on sixteen digits."""
    # 8 d^2 parameters a block, d wide.
    width = 4 * max(4, round((size / 16) ** 0.5 / 4))
    problem = rj.problems.vit(rj.problems.digits(16), width=width, heads=4)
    return problem.loss, problem.params


MODELS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "mlp": mlp,
    "transformer": attention,
}


def process(model: str, size: str, name: str) -> float:
    """Bytes at most of a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--one"]
    done = subprocess.run(
        [*command, f"{model},{size},{name.replace(', ', '/')}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def once(model: str, size: str, name: str) -> float:
    """Run one program, and return the most memory that this process had."""
    loss, params = MODELS[model](SIZES[size])
    function, start = programs(loss, params)[name.replace("/", ", ")]()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
    jax.block_until_ready(jax.jit(function)(zeros))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
