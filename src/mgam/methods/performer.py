"""Performer: a text summed up in random features."""

from mgam.methods.shared import register_trained

register_trained(
    name="performer",
    title="Performer: positive random features in place of the softmax",
    paper="Choromanski et al. 2021, arXiv 2009.14794",
    module="PerformerAttention",
    cover="not a cover",
    choice="none",
    needs=("training from scratch or fine-tuning",),
    state="sums over features: the same size for any text",
    grows=1.0,
)
