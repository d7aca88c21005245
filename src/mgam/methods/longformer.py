"""Longformer's pattern: a window, and leading tokens that all read."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Local

register_pattern(
    lambda s: Local(s.window, "global", tokens=s.budget),
    budget=64,
    name="longformer",
    title="Longformer: window and leading global tokens, by the model's own projections",
    paper="Beltagy et al. 2020, arXiv 2004.05150",
    module="LongformerAttention",
)
