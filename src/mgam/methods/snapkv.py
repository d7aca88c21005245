"""SnapKV: after the prompt, only the tokens that its end attends to are kept."""

from mgam.methods.registry import Method, register
from mgam.policies.eviction import SnapKV

register(
    Method(
        name="snapkv",
        title="SnapKV: the prompt is read densely, then all but the tokens that its end attends to are evicted",
        policy=lambda s, scale: SnapKV(s.budget, s.window, min(128, s.window // 2, s.budget // 2), scale=scale),
        paper="Li et al. 2024, arXiv 2404.14469",
        phase="decode",
        cover="not a cover",
        mass=False,
        grows=0.0,
        positions=("absolute", "granular"),
        state="K and V of `budget` tokens per KV head, and of every generated token",
        defaults=(("window", 256), ("positions", "absolute"), ("rest", "drop"), ("lookahead", "none")),
    )
)
