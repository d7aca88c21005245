"""Window and sink with ranks as positions."""

from mgam.methods.registry import Method, register
from mgam.policies import Window

register(
    Method(
        name="streaming-llm",
        title="StreamingLLM: window and sink, the rest dropped",
        policy=lambda s, scale: Window(s.window, "drop"),
        paper="Xiao et al. 2024, arXiv 2309.17453",
        cover="drops",
        mass=False,
        choice="none",
        state="K and V of window and sink (this form keeps all; only these are read)",
        defaults=(("window", 1472), ("rest", "drop"), ("lookahead", "none")),
    )
)
