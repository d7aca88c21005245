"""Policies: who is read at which level."""

from mgam.policies.base import Policy, Voters
from mgam.policies.fixed import Dyadic, Full, Window
from mgam.policies.scored import Scored

__all__ = ["Dyadic", "Full", "Policy", "Scored", "Voters", "Window"]
