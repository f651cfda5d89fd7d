"""Optax transformations of our own: scalar second moments, and methods for the edge.

Knows: scalar RMSProp, Adam and NAdam, DAL, edge gradient descent, each usable in Optax
without the rest of rodjax. Must not know: flows, trajectories, problems.
"""

from rodjax.transforms._dal import ScaleByDalState, dal, scale_by_dal
from rodjax.transforms._edge import EdgeGradientDescentState, edge_gradient_descent
from rodjax.transforms._scalar import (
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
