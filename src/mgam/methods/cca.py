"""Core context aware attention: far groups of tokens as one core token each."""

from mgam.methods.shared import register_trained

register_trained(
    name="cca",
    title="Core context aware attention: core tokens of the far past, the near past as it is",
    paper="Chen et al. 2025, arXiv 2412.12465",
    module="CoreContextAttention",
    needs=("fine-tuning (the paper: 1,000 steps)",),
    state="K, V and queries of every token",
    grows=2.0,
)
