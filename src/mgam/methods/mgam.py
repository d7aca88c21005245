"""Multi-granular attention with the training-free search."""

from mgam.methods.registry import Method, register
from mgam.policies import Scored

register(
    Method(
        name="mgam",
        title="Multi-granular attention, scored policy",
        policy=lambda s, scale: Scored(
            budget=s.budget, window=s.window, rest=s.rest, mass=s.mass, scale=scale, every=s.every, compact=s.compact
        ),
        paper="this project",
        causal="selection-leak(block) while a given text is read with lookahead=block, else exact",
    )
)
