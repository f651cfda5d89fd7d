"""What `import rodjax` loads, and what is loaded only when it is asked for."""

import json
import subprocess
import sys

import pytest

import rodjax as rj

HEAVY = {"flax", "chex", "xarray", "matplotlib", "orbax", "plotly"}
NETWORKS = {"cnn", "digits_mlp", "mlp", "sequences", "sorting", "supervised", "vit"}
LOOK = f"""
import json, sys
import diffrax, optax
# Some releases of those load chex themselves.
heavy = {HEAVY!r} - sys.modules.keys()
found = []
look = lambda: found.append(sorted(heavy & sys.modules.keys()))
import rodjax as rj
look()
names = dir(rj.problems)
rj.problems.quadratic([1.0])
look()
from rodjax.problems import mlp
look()
print(json.dumps([found, names, mlp is rj.problems.mlp, mlp.__name__]))
"""


def test_nothing_heavy_is_loaded_before_a_network_is_asked_for():
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (first, second, third), names, same, name = json.loads(done.stdout)
    assert first == second == [] and "flax" in third
    assert set(rj.problems.__all__) <= set(names)
    assert same and name == "mlp"


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_are_there_when_asked_for(name):
    assert name in dir(rj.problems) and name in rj.problems.__all__
    assert getattr(rj.problems, name).__name__ == name


def test_all_that_is_promised_exists():
    assert all(hasattr(rj.problems, name) for name in rj.problems.__all__)
    with pytest.raises(AttributeError, match="no attribute 'resnet'"):
        rj.problems.resnet  # noqa: B018
