"""Longformer's pattern: a window, and leading tokens that all read."""

from mgam.methods.registry import Method, register
from mgam.policies.local import Local

register(
    Method(
        name="longformer",
        title="Longformer: window and leading global tokens, by the model's own projections",
        policy=lambda s, scale: Local(s.window, "global", tokens=s.budget),
        paper="Beltagy et al. 2020, arXiv 2004.05150",
        cover="drops",
        mass=False,
        choice="none",
        state="K and V of every token",
        defaults=(("window", 1024), ("budget", 64), ("levels", (1, 64)), ("rest", "drop"), ("lookahead", "none")),
        module="LongformerAttention",
        grows=1.0,
    )
)
