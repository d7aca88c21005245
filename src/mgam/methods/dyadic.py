"""Levels by distance alone."""

from mgam.methods.registry import Method, register
from mgam.policies import Dyadic

register(
    Method(
        name="dyadic",
        title="Levels by distance, no search",
        policy=lambda s, scale: Dyadic(s.window, mass=s.mass),
        paper="in the spirit of Kang et al. 2023, arXiv 2310.11960",
        choice="none",
        grows=1.0,
        defaults=(("lookahead", "none"),),
    )
)
