"""JAX's persistent compilation cache, in a folder of the user."""

import os
from pathlib import Path

import jax

# Programs that took less to compile are not worth a file.
WORTH = 0.2


def use_cache() -> Path:
    """Keep compiled programs for the next start, and say where.

    In `$XDG_CACHE_HOME/rodjax`, by default `~/.cache/rodjax`; where JAX itself has been
    told of a folder (`$JAX_COMPILATION_CACHE_DIR`), there and as it was told.
    """
    told = jax.config.values["jax_compilation_cache_dir"]
    if told:
        return Path(told)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "rodjax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
