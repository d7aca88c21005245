"""Native sparse attention: three branches and a gate for each."""

from mgam.methods.shared import register_trained

register_trained(
    name="nsa",
    title="Native sparse attention: compressed blocks, selected blocks and a window, gated",
    paper="Yuan et al. 2025, arXiv 2502.11089",
    module="NativeSparseAttention",
    cover="overlaps",
    needs=("training from scratch or fine-tuning: projections, compression and gates of its own",),
    state="K and V of every token, three times",
    grows=2.0,
)
