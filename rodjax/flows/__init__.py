"""Continuous-time models of an optimizer, one file each."""

from rodjax.flows.base import Flow
from rodjax.flows.central import central
from rodjax.flows.covariance import covariance
from rodjax.flows.edge import edge
from rodjax.flows.gradient import gradient, igr, third_order
from rodjax.flows.modulated import modulated
from rodjax.flows.principal import principal
from rodjax.flows.rod import rod
from rodjax.flows.stable import stable

__all__ = [
    "Flow",
    "central",
    "covariance",
    "edge",
    "gradient",
    "igr",
    "modulated",
    "principal",
    "rod",
    "stable",
    "third_order",
]
