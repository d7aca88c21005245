"""InfiniRetri: a loop around a model that carries on what the question attends to."""

from dataclasses import dataclass

from mgam.errors import SettingError
from mgam.methods.registry import Method, register


@dataclass(frozen=True)
class Retrieval:
    """The dials of the loop."""

    window: int = 1024
    """Tokens of new text per part."""
    topk: int = 300
    """Tokens of the context that are picked per part; their sentences are carried on."""
    phrase: int = 8
    """Tokens over which attention is summed: about as many as the answer has."""
    budget: int = 2048
    """Tokens carried on at most; the sentences with the lowest scores go first."""

    def __post_init__(self) -> None:
        for name in ("window", "topk", "phrase", "budget"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be 1 or more tokens")


register(
    Method(
        name="infini-retri",
        title="InfiniRetri: the text is read part by part, and sentences that the question attends to are carried on",
        paper="Ye et al. 2025, arXiv 2502.12962",
        form="loop",
        dials=Retrieval,
        cover="not a cover",
        mass=False,
        choice="shared",
        positions=("absolute",),
        needs=("the question, before the text is read",),
        state="the sentences that are carried on",
        grows=1.0,
    )
)
