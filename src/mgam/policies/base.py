"""What a policy is: queries and search keys in, a cover out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from mgam.cover import Cover
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

Rest = Literal["summaries", "drop"]


@dataclass(frozen=True)
class Voters:
    """The queries that have a say in each block's cover.

    Shapes: queries (N, H*G, V, D), rotated only when the pyramid's keys are; live (N, V) bool.
    """

    queries: Tensor
    live: Tensor


@runtime_checkable
class Policy(Protocol):
    """Chooses covers from indices and lengths alone; knows no model, cache or attention code."""

    @property
    def votes(self) -> bool:
        """Whether the choice depends on queries."""
        ...

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers for N blocks. `voters` is None for a policy without votes."""
        ...

    # A policy that needs to see every query, not only voters, has besides:
    # observe(queries (B, H*G, L, D), first (B,), before (B,), pyramid, positions) -> None, called once per call of a
    # layer before covers are chosen, where column 0 of row b stands at position first[b] and before[b] tokens were
    # there already. What it learns it keeps in `pyramid.carried`.

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Upper bound of the entries before the window that a block reads when it stands at position `tokens`."""
        ...
