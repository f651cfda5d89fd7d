"""Continuous-time models of an optimizer, one file each."""

from rodjax.flows.base import Flow
from rodjax.flows.modulated import modulated
from rodjax.flows.rod import rod
from rodjax.flows.stable import stable

__all__ = ["Flow", "modulated", "rod", "stable"]
