"""Optax transformations: scalar second moments, and methods for the edge."""

from rodjax.transforms.dal import ScaleByDalState, dal, scale_by_dal
from rodjax.transforms.edge import EdgeGradientDescentState, edge_gradient_descent
from rodjax.transforms.scalar import (
    ScaleByScalarRmsWithCountState,
    scalar_adam,
    scalar_nadam,
    scalar_rmsprop,
    scale_by_scalar_adam,
    scale_by_scalar_rms,
)

__all__ = [
    "EdgeGradientDescentState",
    "ScaleByDalState",
    "ScaleByScalarRmsWithCountState",
    "dal",
    "edge_gradient_descent",
    "scalar_adam",
    "scalar_nadam",
    "scalar_rmsprop",
    "scale_by_dal",
    "scale_by_scalar_adam",
    "scale_by_scalar_rms",
]
