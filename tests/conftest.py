"""The settings that every test and example runs under."""

import os

import jax
import pytest

os.environ["MPLBACKEND"] = "agg"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """All modules' programs together exhaust the memory that the compiler maps."""
    yield
    jax.clear_caches()
