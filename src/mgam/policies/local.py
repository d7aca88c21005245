"""Local kinds: a window, and chunks before it by a fixed pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mgam.cover import Cover, cover_of, window_start
from mgam.levels import Levels
from mgam.policies.base import Voters
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

Pattern = Literal["none", "strided", "dilated"]


@dataclass(frozen=True)
class Local:
    """Window at level 0; by pattern besides: nothing, every `stride`-th chunk of the text, or chunks at distances of
    1, 2, 4, ... from the window. The rest is dropped.
    """

    window: int = 512
    pattern: Pattern = "none"
    stride: int = 8

    votes = False

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers that look at places only."""
        device = pyramid.keys[0].device
        start = window_start(blocks.decide, self.window, levels).to(device)
        near = (start // levels.chunk)[:, None]
        number = torch.arange(int(near.max()) if len(blocks) else 0, device=device)[None]
        if self.pattern == "strided":
            opened = (number % self.stride == 0) & (number < near)
        elif self.pattern == "dilated":
            distance = near - number
            opened = (distance > 0) & (distance & (distance - 1) == 0)
        else:
            opened = torch.zeros_like(number < near)
        wide = opened[:, None].expand(-1, pyramid.keys[0].shape[1], -1)
        return cover_of(wide, start, levels, rest="drop", sink=False)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """As many chunks as the pattern opens."""
        chunks = tokens // levels.chunk + 1
        most = {"none": 0, "strided": -(-chunks // self.stride), "dilated": chunks.bit_length()}
        return levels.chunk * most[self.pattern]
