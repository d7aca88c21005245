"""Local kinds: a window, and chunks before it by a fixed pattern; blocks with an exchange at their borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mgam.cover import Cover, cover_of, window_start
from mgam.levels import Levels
from mgam.policies.base import Voters
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

Pattern = Literal["none", "strided", "dilated", "global", "random"]


@dataclass(frozen=True)
class Local:
    """Window at level 0; besides, by pattern: nothing (`none`); chunks 0, `stride`, 2 `stride`, ... of the text,
    the same for all queries (`strided`); chunks at distances of 1, 2, 4, ... from the window (`dilated`); the first
    `tokens` tokens of the text, in whole chunks (`global`); the first chunk and `tokens` tokens in chunks drawn anew
    for every place of the window (`random`). The rest is dropped.
    """

    window: int = 512
    pattern: Pattern = "none"
    stride: int = 8
    tokens: int = 64

    votes = False
    by_place = True

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
        elif self.pattern == "global":
            opened = (number < self.tokens // levels.chunk) & (number < near)
        elif self.pattern == "random":
            opened = _drawn(near, number, self.tokens // levels.chunk)
        else:
            opened = torch.zeros_like(number < near)
        wide = opened[:, None].expand(-1, pyramid.keys[0].shape[1], -1)
        return cover_of(wide, start, levels, rest="drop", sink=False)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """As many chunks as the pattern opens."""
        chunks = tokens // levels.chunk + 1
        given = self.tokens // levels.chunk
        most = {
            "none": 0,
            "strided": -(-chunks // self.stride),
            "dilated": chunks.bit_length(),
            "global": min(chunks, given),
            "random": min(chunks, 1 + given),
        }
        return levels.chunk * most[self.pattern]


@dataclass(frozen=True)
class Blockwise:
    """The block of `size` tokens that a query stands in, up to itself, and the last `exchange` tokens before it.

    Queries that share a cover read what the first of them reads, and on to themselves.
    """

    size: int = 768
    exchange: int = 256

    votes = False
    by_place = True

    @property
    def window(self) -> int:
        """Tokens read at most before a block of queries ends, for the room that this takes."""
        return self.size + self.exchange

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers that begin where the block before the query's ends, less what is exchanged."""
        device = pyramid.keys[0].device
        begin = (blocks.decide // self.size * self.size - self.exchange).clamp_min(0)
        start = (begin // levels.chunk * levels.chunk).to(device)
        none = torch.zeros(len(blocks), pyramid.keys[0].shape[1], 0, dtype=torch.bool, device=device)
        return cover_of(none, start, levels, rest="drop", sink=False)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Nothing stands before the window."""
        return 0


def _drawn(near: Tensor, number: Tensor, count: int) -> Tensor:
    """(N, C) bool: chunk 0, and the `count` of the chunks 1 ... near-1 to which a hash of both numbers is kindest."""
    mixed = (near * 0x9E3779B1 + number * 0x85EBCA77) & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x27D4EB2F):
        mixed = ((mixed >> 15) ^ mixed) * factor & 0x7FFFFFFF
    among = (number > 0) & (number < near)
    order = mixed.masked_fill(~among, 1 << 31).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (among & (order < count)) | ((number == 0) & (near > 0))
