"""H2O: the tokens that were attended to most, and the last ones."""

from mgam.methods.registry import Method, register
from mgam.policies.eviction import HeavyHitters

register(
    Method(
        name="h2o",
        title="H2O: heavy hitters and recent tokens are kept while generating, the rest is evicted",
        policy=lambda s, scale: HeavyHitters(s.budget, s.window, scale),
        paper="Zhang et al. 2023, arXiv 2306.14048",
        phase="decode",
        cover="not a cover",
        mass=False,
        grows=0.0,
        positions=("absolute", "granular"),
        state="K and V of `budget` and `window` tokens per KV head, and the attention that each got",
        defaults=(
            ("budget", 512),
            ("window", 512),
            ("positions", "absolute"),
            ("rest", "drop"),
            ("lookahead", "none"),
        ),
    )
)
