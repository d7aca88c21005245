"""Multi-granular attention, with the training-free search or a learned one."""

from mgam.methods.registry import Method, register
from mgam.policies import PerLayer, Policy, Scored
from mgam.policies.files import FittedPolicy, resolve
from mgam.policies.learned import LearnedLayers
from mgam.settings import Settings


def policy(s: Settings, scale: float) -> Policy | PerLayer:
    """The learned policy that the settings name, else the scored one."""
    if s.policy is None:
        return Scored(s.budget, s.window, s.rest, s.mass, scale, s.every, s.compact)
    fitted = FittedPolicy.load(resolve(s.policy))
    mark = None if s.recall is None else fitted.mark(s.recall)
    return LearnedLayers.of(
        fitted.layers, budget=s.budget, window=s.window, rest=s.rest, mass=s.mass, mark=mark, middle=s.middle,
        content=s.content,
    )  # fmt: skip


register(
    Method(
        name="mgam",
        title="Multi-granular attention, scored policy; a learned one with policy=FOLDER",
        policy=policy,
        paper="this project",
        module="MultiGranularAttention",
        searches=True,
        causal="selection-leak(block) while a given text is read with lookahead=block, else exact",
    )
)
