"""BigBird's pattern: a window, the first chunk, and chunks drawn at random."""

from mgam.methods.registry import Method, register
from mgam.policies.local import Local

register(
    Method(
        name="bigbird",
        title="BigBird: window, first chunk, and random chunks that are drawn by place",
        policy=lambda s, scale: Local(s.window, "random", tokens=s.budget),
        paper="Zaheer et al. 2020, arXiv 2007.14062",
        cover="drops",
        mass=False,
        choice="none",
        state="K and V of every token",
        defaults=(("window", 1024), ("budget", 192), ("levels", (1, 64)), ("rest", "drop"), ("lookahead", "none")),
        module="BigBirdAttention",
        grows=1.0,
    )
)
