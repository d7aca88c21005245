"""Blocks of a text that read themselves and the end of the block before."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Blockwise

register_pattern(
    lambda s: Blockwise(s.window - s.window // 4, s.window // 4),
    name="blockwise",
    title="Blockwise: the query's own block, and the end of the one before",
    paper="Qiu et al. 2019, arXiv 1911.02972; exchange of borders as in local attention with look-back",
    module="LocalAttention",
    kind="blockwise",
)
