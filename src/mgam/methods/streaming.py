"""StreamingLLM: window and sink with ranks as positions; the rest is evicted."""

from mgam.methods.registry import Method, register
from mgam.policies.eviction import Sliding

register(
    Method(
        name="streaming-llm",
        title="StreamingLLM: window and sink, the rest evicted",
        policy=lambda s, scale: Sliding(s.window, "drop", spare=max(256, 2 * s.block)),
        paper="Xiao et al. 2024, arXiv 2309.17453",
        cover="drops",
        mass=False,
        choice="none",
        grows=1.0,
        state="K and V of window and sink, and of a few hundred tokens in reserve",
        defaults=(("window", 1472), ("rest", "drop"), ("lookahead", "none")),
    )
)
