"""The settings that every test and example runs under."""

import gc
import os
import tempfile
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
# What one worker or notebook has compiled, the others of this run find.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="rodjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Before anything imports rodjax: shapes and types are checked at every call.
jaxtyping.install_import_hook("rodjax", "typecheck.check")
# Started here, so that the command line's tests cannot give JAX other devices.
jax.devices()


def pytest_configure(config):
    """What is read from the cache while another process writes it is compiled anew."""
    config.addinivalue_line(
        "filterwarnings",
        "ignore:Error (reading|writing) persistent compilation cache entry",
    )


def pytest_collection_finish():
    """What is there by now stays: let the garbage collector no longer look at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """All modules' programs together exhaust the memory that the compiler maps."""
    yield
    maps = Path("/proc/self/maps")
    # Of 65530 at most; a program that is kept need not be compiled again.
    if not maps.exists() or maps.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
