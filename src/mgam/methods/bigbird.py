"""BigBird's pattern: a window, the first chunk, and chunks drawn at random."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Local

register_pattern(
    lambda s: Local(s.window, "random", tokens=s.budget),
    budget=192,
    name="bigbird",
    title="BigBird: window, first chunk, and random chunks that are drawn by place",
    paper="Zaheer et al. 2020, arXiv 2007.14062",
    module="BigBirdAttention",
)
