"""A window, and chunks at doubling distances from it."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Local

register_pattern(
    lambda s: Local(s.window, "dilated"),
    name="dilated",
    title="Dilated: window and chunks at doubling distances",
    paper="Ding et al. 2023, arXiv 2307.02486",
    module="LocalAttention",
    kind="dilated",
)
