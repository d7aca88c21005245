"""Mixture of Block Attention: the blocks whose mean key a query likes best."""

from mgam.methods.registry import Method, register
from mgam.policies.ranked import ByMean

register(
    Method(
        name="moba",
        title="MoBA: blocks by their mean key, a choice per query head",
        policy=lambda s, scale: ByMean(s.budget, s.window, "drop", sink=False, per_head=True),
        paper="Lu et al. 2025, arXiv 2502.13189",
        cover="drops",
        mass=False,
        choice="per head",
        module="MobaAttention",
        positions=("absolute", "granular"),
        state="K and V of every token, means of blocks",
        defaults=(
            ("levels", (1, 512)),
            ("budget", 1024),
            ("window", 1),
            ("block", 16),
            ("question_block", 1),
            ("positions", "absolute"),
            ("rest", "drop"),
            ("lookahead", "none"),
        ),
    )
)
