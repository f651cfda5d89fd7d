"""How close each flow stays to its optimizer at the edge of stability.

Nine optimizers on three networks (MLP, CNN, vision transformer), each on a window of
steps of which it spends at least half at its stability threshold: the run, then every
flow that serves the optimizer, from the run's own start, on several seeds of data and
weights. Of each flow the table has the distance of its centre from the run's midpoints
(at the end and averaged over the window, relative to the stable flow's) and the median
of its sharpness over threshold in the last third. The column `limit` is the distance of
the run from itself where it is nudged by one rounding error (`rj.predictability`); a
second table relates the flows to it, a third has the horizons: steps until a distance
passes 5 % of the stable flow's last. Figures of several seeds are medians.

    python benchmarks/accuracy.py                          # on digits
    python benchmarks/accuracy.py --rows mlp-gd,cnn-adam --seeds 0,1 --float64
    python benchmarks/accuracy.py --data mnist1d --out accuracy-mnist1d
    python benchmarks/accuracy.py --cifar10 PATH --n 1000 --out accuracy-cifar10

It writes a picture and a NetCDF file for each row and seed, and `accuracy.json`, from
which the same command goes on after it was stopped, or adds rows, seeds and flows.
"""

import json
from functools import partial
from typing import Any

import jax
from _accuracy_tables import conclude, figures, horizons, line, over_limit, titles
from _common import arguments, head, row, words, write
from _rows import (
    FLOWS,
    LIMIT,
    LOST,
    NETWORKS,
    OTHER_WINDOWS,
    SAMPLES,
    WINDOWS,
    Window,
    lacking,
    measure,
    served,
)

from rodjax import problems


def window_of(windows: Any, name: str, measured: Any) -> Window:
    """A row's window; a learning rate to be found is found once, on the first seed."""
    window = windows[name]
    known = next(iter(measured.values()), None)
    if window.lr is None and known is not None:
        return window._replace(lr=known["lr"])
    return window


def check_same(name: str, measured: Any, window: Window) -> None:
    """Raise `SystemExit` if a row was measured on another window."""
    for seed, found in measured.items():
        if (found["lr"], found["warmup"], found["steps"]) != window:
            raise SystemExit(
                f"{name}, seed {seed}, was measured on another window: remove it from "
                "accuracy.json, or give another --out"
            )


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "accuracy")
    parser.add_argument("--rows", help="comma-separated; all if none")
    parser.add_argument("--flows", default=",".join(FLOWS), help="likewise")
    parser.add_argument("--data", default="digits", choices=["digits", "mnist1d"])
    parser.add_argument("--cifar10", metavar="PATH", help="in place of them")
    parser.add_argument("--n", type=int, help=f"samples; else {SAMPLES}")
    parser.add_argument("--seeds", default="0,1,2", help="of weights and samples")
    parser.add_argument("--float64", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.float64)
    data = "cifar10" if options.cifar10 else options.data
    windows = {
        "digits": WINDOWS,
        "mnist1d": OTHER_WINDOWS,
        "cifar10": dict.fromkeys(WINDOWS, Window()),
    }[data]
    rows, flows = words(options.rows or ",".join(windows)), words(options.flows)
    for flag, given, known in (("rows", rows, windows), ("flows", flows, FLOWS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{flag}: unknown {sorted(unknown)}; choose from {[*known]}")

    readers = {
        "digits": problems.digits,
        "mnist1d": problems.mnist1d,
        "cifar10": partial(problems.cifar10, options.cifar10),
    }
    networks = dict.fromkeys(name.partition("-")[0] for name in windows)
    settings: dict[str, Any] = {
        "data": data,
        "n": {name: options.n or SAMPLES[name] for name in networks},
        "dtype": "float64" if options.float64 else "float32",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "accuracy.json"
    saved = json.loads(file.read_text()) if file.exists() else settings | {"rows": {}}
    if {key: saved[key] for key in settings} != settings:
        parser.error(f"--out {options.out} holds rows of other settings: give another")

    print(head(titles(flows)))
    for name in rows:
        network, optimizer = name.split("-", 1)
        wanted = served(optimizer, flows)
        for seed in words(options.seeds):
            measured = saved["rows"].get(name, {}).get("seeds", {})
            window = window_of(windows, name, measured)
            check_same(name, measured, window)
            found = measured.get(seed)
            if found is None or LIMIT not in found or lacking(found, wanted):
                n = settings["n"][network]
                sample = readers[data](n=n, skip=n * int(seed))
                problem = NETWORKS[network](sample, seed=int(seed))
                out = options.out / f"{name}-{seed}"
                new = measure(problem, optimizer, window, wanted, found, out)
                saved["rows"][name] = {"seeds": measured | {seed: new}}
                write(file, saved, indent=1)
        measured = saved["rows"][name]["seeds"]
        saved["rows"][name] = figures(measured) | {"seeds": measured}
        write(file, saved, indent=1)
        print(row(line(name, saved["rows"][name], flows)), flush=True)
    print(
        f"\nOver the limit, final / mean:\n\n{over_limit(saved['rows'], rows, flows)}"
    )
    share = format(LOST, ".0%")
    print(f"\nSteps until a distance passes {share} of the stable flow's last:\n")
    print(horizons(saved["rows"], rows, flows))
    conclude({name: saved["rows"][name] for name in rows}, flows)


if __name__ == "__main__":
    main()
