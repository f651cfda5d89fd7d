"""Continuous-time models of an optimizer: one file a flow, one registry of them all.

Knows: what a flow is (`Flow`), every flow with its state, which optimizers each
serves, and the helpers that a flow of one's own needs. Must not know: how a flow is
solved, what is recorded along it, problems, files.
"""

from rodjax.flows._central import CentralState, central
from rodjax.flows._covariance import CovarianceState, covariance
from rodjax.flows._edge import EdgeState, edge
from rodjax.flows._flow import (
    Floor,
    Flow,
    centre_of,
    floor_size,
    half_step_back,
    moving,
    rms,
    shift,
    stack,
)
from rodjax.flows._gradient import gradient
from rodjax.flows._igr import igr
from rodjax.flows._logarithm import principal_coefficient
from rodjax.flows._modulated import ModulatedState, modulated
from rodjax.flows._polar import PolarState, polar
from rodjax.flows._principal import PrincipalState, TopState, principal
from rodjax.flows._registry import REGISTRY, Record, table
from rodjax.flows._ringing import Ringing, ringing
from rodjax.flows._rod import RodState, rod
from rodjax.flows._scope import (
    PeriodWarning,
    check_seen,
    gradient_descent_start,
    preconditioned_start,
    warn_of_period,
)
from rodjax.flows._stable import stable
from rodjax.flows._third_order import third_order

__all__ = [
    "REGISTRY",
    "CentralState",
    "CovarianceState",
    "EdgeState",
    "Floor",
    "Flow",
    "ModulatedState",
    "PeriodWarning",
    "PolarState",
    "PrincipalState",
    "Record",
    "Ringing",
    "RodState",
    "TopState",
    "central",
    "centre_of",
    "check_seen",
    "covariance",
    "edge",
    "floor_size",
    "gradient",
    "gradient_descent_start",
    "half_step_back",
    "igr",
    "modulated",
    "moving",
    "polar",
    "preconditioned_start",
    "principal",
    "principal_coefficient",
    "ringing",
    "rms",
    "rod",
    "shift",
    "stable",
    "stack",
    "table",
    "third_order",
    "warn_of_period",
]
