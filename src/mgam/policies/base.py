"""What a policy is: queries and search keys in, a cover out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from mgam.cover import Cover
from mgam.levels import Levels
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

Rest = Literal["summaries", "drop"]

WHOLE = 32
"""Blocks of at most so many voters are heard in full, however few of a larger block's are."""


@dataclass(frozen=True)
class Voters:
    """The queries that have a say in each block's cover.

    Shapes: queries (N, H*G, V, D), rotated only when the pyramid's keys are; live (N, V) bool.
    """

    queries: Tensor
    live: Tensor

    def __getitem__(self, part: slice | Tensor) -> Voters:
        return Voters(self.queries[part], self.live[part])


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

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Upper bound of the entries before the window that a block reads when it stands at position `tokens`."""
        ...


@runtime_checkable
class ByPlace(Protocol):
    """A policy that says whether its choice follows from places alone: then the layers of a call share its covers."""

    by_place: bool


@runtime_checkable
class PerLayer(Protocol):
    """The policies of a model's layers, where they differ."""

    def at(self, layer: int) -> Policy:
        """The policy of one layer."""
        ...


def of_layer(policy: Policy | PerLayer, layer: int) -> Policy:
    """The policy that one layer reads with."""
    return policy.at(layer) if isinstance(policy, PerLayer) else policy


def keeps_state(policy: Policy) -> bool:
    """Whether it forgets tokens or learns while it reads."""
    return isinstance(policy, Observing | Evicting)


@dataclass(frozen=True)
class Heard:
    """What a call of a layer brings, for policies that need every query and not only voters.

    Shapes: queries (B, H*G, L, D), of which column 0 of row b stands at position `first[b]`.
    """

    queries: Tensor
    first: list[int]
    before: list[int]
    """Tokens that each row held before the call."""
    dense_to: list[int]
    """Position up to which each row is read densely: the prompt, where only generation is served."""
    positions: Positions

    def between(self, row: int, low: int, high: int) -> Tensor:
        """Queries (H*G, high - low, D) of positions [low, high), all of this call."""
        return self.queries[row, :, low - self.first[row] : high - self.first[row]]


@runtime_checkable
class Observing(Protocol):
    """A policy that hears every query; what it learns it keeps in `pyramid.carried`."""

    def observe(self, heard: Heard, pyramid: Pyramid) -> None:
        """Called once per call of a layer, before covers are chosen; the pyramid holds the call's keys."""
        ...


@runtime_checkable
class Evicting(Protocol):
    """A policy that forgets tokens for good, which frees their memory."""

    by_block: bool
    """Whether it forgets before every block; else once in a call, after what is dense."""

    def evict(self, heard: Heard, begin: list[int], pyramid: Pyramid) -> None:
        """Called before blocks of row b are read of which the first was decided at `begin[b]` (-1: none is read).

        Tokens before that position may be forgotten, by `pyramid.keep`. It is called for dense parts too, with -1.
        """
        ...

    def count(self, heard: Heard, read_to: list[int], pyramid: Pyramid) -> None:
        """Called after the same blocks were read, up to position `read_to[b]` (0: none was)."""
        ...


def at_most(budget: int, rest: Rest, tokens: int, levels: Levels) -> int:
    """Upper bound of the entries before position `tokens` where `budget` tokens are opened: sink, budget, and the
    summaries around what is opened."""
    most = budget // levels.chunk
    inner = sum(levels.ratio(level) for level in range(2, levels.top + 1))
    around = (most + 2) * max(inner, 1) + tokens // levels.sizes[-1] + levels.ratio(1)
    return levels.chunk + budget + (0 if rest == "drop" else around)
