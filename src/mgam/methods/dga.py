"""Dynamic group attention: what matters as tokens, the rest in groups."""

from mgam.methods.shared import register_trained

register_trained(
    name="dga",
    title="Dynamic group attention: focal tokens as they are, the others pooled in groups",
    paper="2025, arXiv 2505.22107",
    module="DynamicGroupAttention",
    needs=("fine-tuning (the paper: 1,000 steps)",),
    state="K, V and queries of every token",
    grows=2.0,
)
