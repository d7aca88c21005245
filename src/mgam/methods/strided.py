"""A window, and chunks of the text at a stride."""

from mgam.methods.shared import register_pattern
from mgam.policies.local import Local

register_pattern(
    lambda s: Local(s.window, "strided"),
    name="strided",
    title="Strided: window and every eighth chunk of the text",
    paper="Child et al. 2019, arXiv 1904.10509",
    module="LocalAttention",
    kind="strided",
    grows=2.0,
)
