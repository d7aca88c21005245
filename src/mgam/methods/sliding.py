"""A sliding window alone."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Local

register_pattern(
    lambda s: Local(s.window, "none"),
    name="sliding",
    title="Sliding window: the rest dropped",
    paper="Beltagy et al. 2020, arXiv 2004.05150",
    module="LocalAttention",
    kind="sliding",
)
