"""Local kinds: a sliding window, with chunks before it at a stride or at doubling distances; blocks that exchange."""

from mgam.methods.registry import Method, register
from mgam.policies.local import Blockwise, Local

for name, title, pattern, paper, grows in (
    ("sliding", "Sliding window: the rest dropped", "none", "Beltagy et al. 2020, arXiv 2004.05150", 1.0),
    (
        "strided",
        "Strided: window and every eighth chunk of the text",
        "strided",
        "Child et al. 2019, arXiv 1904.10509",
        2.0,
    ),
    (
        "dilated",
        "Dilated: window and chunks at doubling distances",
        "dilated",
        "Ding et al. 2023, arXiv 2307.02486",
        1.0,
    ),
):
    register(
        Method(
            name=name,
            title=title,
            policy=lambda s, scale, pattern=pattern: Local(s.window, pattern),  # type: ignore[misc]
            paper=paper,
            cover="drops",
            mass=False,
            choice="none",
            state="K and V of every token",
            defaults=(("window", 1024), ("levels", (1, 64)), ("rest", "drop"), ("lookahead", "none")),
            module="LocalAttention",
            grows=grows,
        )
    )

register(
    Method(
        name="blockwise",
        title="Blockwise: the query's own block, and the end of the one before",
        policy=lambda s, scale: Blockwise(s.window - s.window // 4, s.window // 4),
        paper="Qiu et al. 2019, arXiv 1911.02972; exchange of borders as in local attention with look-back",
        cover="drops",
        mass=False,
        choice="none",
        state="K and V of every token",
        defaults=(("window", 1024), ("levels", (1, 64)), ("rest", "drop"), ("lookahead", "none")),
        module="LocalAttention",
        grows=1.0,
    )
)
