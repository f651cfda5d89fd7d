"""Optax transformations with one scalar second moment for the whole gradient."""

from rodjax.transforms.scalar import (
    ScaleByScalarRmsWithCountState,
    scalar_adam,
    scalar_nadam,
    scalar_rmsprop,
    scale_by_scalar_adam,
    scale_by_scalar_rms,
)

__all__ = [
    "ScaleByScalarRmsWithCountState",
    "scalar_adam",
    "scalar_nadam",
    "scalar_rmsprop",
    "scale_by_scalar_adam",
    "scale_by_scalar_rms",
]
