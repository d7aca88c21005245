"""LongHeads: every query head picks its own chunks and reads them at ranks that stay within the trained window."""

from mgam.methods.registry import Method, register
from mgam.policies.heads import ByChunkKey

register(
    Method(
        name="longheads",
        title="LongHeads: chunks per query head, by keys made from the attention inside each chunk",
        policy=lambda s, scale: ByChunkKey(s.budget, s.window, "drop", per_head=True),
        paper="Lu et al. 2024, arXiv 2402.10685",
        cover="drops",
        mass=False,
        grows=1.0,
        choice="per head",
        positions=("granular",),
        state="K and V of every token, a key per chunk and query head, queries of the last two chunks",
        defaults=(
            ("levels", (1, 256)),
            ("budget", 1280),
            ("window", 257),
            ("block", 32),
            ("question_block", 8),
            ("rest", "drop"),
            ("lookahead", "none"),
        ),
    )
)
