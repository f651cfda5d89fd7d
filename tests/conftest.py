"""The settings that every test and example runs under."""

import os

import jax

os.environ["MPLBACKEND"] = "agg"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
