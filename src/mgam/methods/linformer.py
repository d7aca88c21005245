"""Linformer: a text's keys and values projected to a fixed number of rows."""

from mgam.methods.shared import register_trained

register_trained(
    name="linformer",
    title="Linformer: keys and values projected along the text to a fixed number of rows",
    paper="Wang et al. 2020, arXiv 2006.04768",
    module="LinformerAttention",
    causal="none",
    cover="not a cover",
    choice="none",
    needs=("training from scratch or fine-tuning, in an encoder",),
    state="none: it has no causal form",
    grows=1.0,
)
