"""Policies that look at positions only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.cover import Cover, cover_of, dense_cover, window_start
from mgam.levels import Levels
from mgam.policies.base import Rest, Voters
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks


@dataclass(frozen=True)
class Full:
    """Everything at level 0: dense attention."""

    votes = False
    by_place = True

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Dense covers."""
        return dense_cover(blocks, pyramid.keys[0].shape[1], levels, pyramid.keys[0].device)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Nothing stands before the window: the window is the whole past."""
        return 0


@dataclass(frozen=True)
class Opened:
    """Everything at level 0, chunk by chunk: reads what `Full` does, and tells the attention that each chunk gets."""

    window: int = 64

    votes = False
    by_place = True

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers that open every chunk before the window."""
        start, opened = _nothing_opened(self.window, blocks, pyramid, levels)
        number = torch.arange(opened.shape[-1], device=start.device)
        return cover_of(opened | ((number + 1) * levels.chunk <= start[:, None])[:, None], start, levels, rest="drop")

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Everything."""
        return tokens


@dataclass(frozen=True)
class Window:
    """Window and sink at level 0; the rest as the coarsest summaries, or dropped."""

    window: int = 512
    rest: Rest = "drop"
    mass: float = 1.0

    votes = False
    by_place = True

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers that open the first chunk only."""
        start, opened = _nothing_opened(self.window, blocks, pyramid, levels)
        return cover_of(opened, start, levels, rest=self.rest, mass=self.mass)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Sink, and what `refine` splits at both ends."""
        return levels.chunk + (0 if self.rest == "drop" else _coarse(tokens, 2, levels))


@dataclass(frozen=True)
class Dyadic:
    """Levels by distance: `reach` chunks of each level before the window, the coarsest for all that is farther.

    In the spirit of fast multipole attention (Kang et al. 2023, arXiv 2310.11960), with keys coarse and queries fine.
    """

    window: int = 512
    reach: int = 32
    mass: float = 1.0

    votes = False
    by_place = True

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers whose chunks grow with distance."""
        start, opened = _nothing_opened(self.window, blocks, pyramid, levels)
        keep: list[Tensor | None] = []
        near = start
        for level in range(2, levels.top + 1):
            near = (near - self.reach * levels.sizes[level - 1]).clamp_min(0)
            count = -(-opened.shape[-1] * levels.chunk // levels.sizes[level])
            ends = (torch.arange(1, count + 1, device=start.device) * levels.sizes[level])[None, None]
            keep.append((ends > near[:, None, None]).expand(-1, opened.shape[1], -1))
        return cover_of(opened, start, levels, mass=self.mass, keep=keep)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Sink, `reach` entries a level, and the coarsest level for the rest."""
        return levels.chunk + self.reach * levels.top + _coarse(tokens, 3, levels)


def _nothing_opened(window: int, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> tuple[Tensor, Tensor]:
    states = pyramid.keys[0]
    start = window_start(blocks.decide, window, levels).to(states.device)
    chunks = int(start.max()) // levels.chunk if len(blocks) else 0
    return start, torch.zeros(len(blocks), states.shape[1], chunks, dtype=torch.bool, device=states.device)


def _coarse(tokens: int, splits: int, levels: Levels) -> int:
    """Summaries at most when `splits` coarsest chunks are split."""
    inner = sum(levels.ratio(level) for level in range(2, levels.top + 1))
    return tokens // levels.sizes[-1] + splits * inner + levels.ratio(1)
