"""Reformer: tokens that hash alike read each other."""

from mgam.methods.shared import register_trained

register_trained(
    name="reformer",
    title="Reformer: tokens that hash alike read each other; queries and keys are shared",
    paper="Kitaev et al. 2020, arXiv 2001.04451",
    module="ReformerAttention",
    causal="selection-leak(text)",
    cover="overlaps",
    choice="per head",
    needs=("training from scratch, since queries and keys are one",),
    state="K and V of every token",
    grows=1.0,
)
