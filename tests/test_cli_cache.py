"""The command line keeps compiled programs in a folder of the user."""

import os
import subprocess
import sys

import pytest

# In a process of its own, for JAX reads its settings once.
SCRIPT = """
import sys
import jax, jax.numpy as jnp
from rodjax.cli import app
app(sys.argv[1:], standalone_mode=False)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(3)).block_until_ready()
"""


def run(arguments, **environment):
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment |= {name: os.environ[name] for name in kept if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("arguments", [["list"], ["--no-cache", "list"]])
def test_programs_are_kept_unless_told_otherwise(arguments, tmp_path):
    run(arguments, XDG_CACHE_HOME=str(tmp_path))
    assert any(tmp_path.glob("rodjax/*-cache")) == (arguments == ["list"])


def test_a_folder_that_jax_was_told_of_is_left(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    told = {"JAX_COMPILATION_CACHE_DIR": str(own), "XDG_CACHE_HOME": str(other)}
    run(["list"], **told)
    assert any(own.glob("*-cache")) and not other.exists()
