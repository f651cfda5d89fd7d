"""The settings that every test and example runs under."""

import os
from pathlib import Path

import jax
import jaxlib
import jaxtyping
import pytest

# Nearly all of the time goes into compiling programs that run once.
flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if jaxlib.version.__version_info__ < (0, 11):
    # A fourth less to compile; later versions have these emitters only.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = flags
os.environ["MPLBACKEND"] = "agg"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Before anything imports rodjax: shapes and types are checked at every call.
jaxtyping.install_import_hook("rodjax", "typecheck.check")
# Started here, so that the command line's tests cannot give JAX other devices.
jax.devices()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """All modules' programs together exhaust the memory that the compiler maps."""
    yield
    maps = Path("/proc/self/maps")
    # Of 65530 at most; a program that is kept need not be compiled again.
    if not maps.exists() or maps.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
