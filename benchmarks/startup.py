"""Where the time of `rodjax run` goes: cold, with an empty cache, and started again.

The command without options (digits MLP, gradient descent, three flows, predictability
limit, 440 steps) in a process of its own, three times: without the cache of compiled
programs, with an empty one, and with what that left. Wall time is of the whole process;
its parts are what JAX says of itself: tracing, lowering, compiling (or reading what was
compiled); "else" is importing, computing, and writing files. Compiling takes several
threads, so that it depends on the cores.

    python benchmarks/startup.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import arguments, head, row, write

PARTS = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compiling",
}
#: In the process that is measured: the command, and the sums of what JAX tells.
INSIDE = """
import collections, json, sys
import jax
file, sums = sys.argv.pop(1), collections.Counter()
told = lambda name, seconds, **_: sums.update({name.rpartition("/")[2]: seconds})
jax.monitoring.register_event_duration_secs_listener(told)
import rodjax.cli
try:
    rodjax.cli.main()
finally:
    with open(file, "w") as out:
        json.dump(sums, out)
"""


def start(folder: Path, *options: str) -> dict[str, float]:
    """Seconds of one start, in all and by part."""
    file = folder / "parts.json"
    command = [sys.executable, "-c", INSIDE, str(file), *options, "run"]
    command += ["--out", str(folder / "run"), "--overwrite"]
    inside = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    inside.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    subprocess.run(command, env=inside, check=True, capture_output=True)
    whole = time.perf_counter() - began
    sums = json.loads(file.read_text())
    parts = {part: sums[name] for name, part in PARTS.items()}
    return parts | {"else": whole - sum(parts.values()), "in all": whole}


def main() -> None:
    """Measure, print and write."""
    options = arguments(__doc__, "startup.json").parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "no cache": start(folder, "--no-cache"),
            "an empty cache": start(folder),
            "again": start(folder),
        }
    print(head(["seconds", *next(iter(found.values()))]))
    for case, parts in found.items():
        print(row([case, *(f"{value:.1f}" for value in parts.values())]))
    write(options.out, {"cores": os.cpu_count(), "starts": found}, indent=1)


if __name__ == "__main__":
    main()
