"""Policies: who is read at which level."""

from mgam.policies.base import PerLayer, Policy, Voters
from mgam.policies.fixed import Dyadic, Full, Window
from mgam.policies.scored import Scored

__all__ = ["Dyadic", "Full", "PerLayer", "Policy", "Scored", "Voters", "Window"]
