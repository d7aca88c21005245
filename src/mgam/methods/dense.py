"""Dense attention: the baseline that every figure is shown beside."""

from mgam.methods.registry import Method, register
from mgam.policies import Full

register(
    Method(
        name="dense",
        title="Dense attention",
        policy=lambda s, scale: Full(),
        paper="Vaswani et al. 2017, arXiv 1706.03762",
        choice="none",
        module="FullAttention",
        mass=False,
        positions=("absolute", "granular"),
        defaults=(("positions", "absolute"), ("lookahead", "none")),
        state="K and V of every token",
    )
)
