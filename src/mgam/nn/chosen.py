"""Covers of a trainable pyramid: which chunks blocks of queries read as tokens, and at which level the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam.levels import Levels
from mgam.nn.scores import Part

# Shape letters: B rows, H KV heads, N blocks of queries, C chunks, C_l regions of level l, K chunks opened.

Rest = Literal["summaries", "drop"]


@dataclass(frozen=True)
class Chosen:
    """What blocks read besides their windows.

    Shapes: opened (B, H, N, K), chunks read as tokens, -1 for none; read[l-1] (B, H, N, C_l), summaries that are read.
    """

    opened: Tensor
    read: tuple[Tensor, ...]


@dataclass(frozen=True)
class Chooser:
    """Makes covers out of scores; what its fields mean is told by `LearnedGranularAttention`."""

    levels: Levels
    budget: int
    middle: int
    share: float | None
    rest: Rest

    def free(self, part: Part, chunks: int) -> tuple[Tensor, Tensor]:
        """Chunks (N, C) outside the windows, and those of them that a policy may open: all but the first."""
        end = (torch.arange(chunks, device=part.start.device) + 1) * part.chunk
        visible = end <= part.left[:, None]
        if not part.causal:
            visible = visible | ((end - part.chunk >= part.right[:, None]) & (end <= part.tokens))
        free = visible.clone()
        free[:, 0] = False
        return visible, free

    @torch.no_grad()
    def __call__(self, part: Part, score: Tensor, near: Tensor | None) -> Chosen:
        """The cover of each block, by scores (B, H, N, C) of chunks and (B, H, N) of what is near."""
        chunks = score.shape[-1]
        visible, free = self.free(part, chunks)
        most = min(self.budget // part.chunk, chunks)
        ranked = score.masked_fill(~free, -torch.inf).sort(dim=-1, descending=True, stable=True)
        value, opened = ranked.values[..., :most], ranked.indices[..., :most]
        wanted = value > -torch.inf
        if near is not None and self.share is not None:
            total = torch.logaddexp(near, ranked.values.logsumexp(-1))[..., None]
            gain = (value - total).exp()
            wanted &= (near[..., None] - total).exp() + gain.cumsum(-1) - gain < self.share
        fine = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, opened, wanted)
        fine[..., 0] = visible[:, 0]
        opened = opened.masked_fill(~wanted, -1)
        if self.rest == "drop":
            return Chosen(opened, ())
        return Chosen(opened, self._rest(score, fine, visible.expand_as(fine)))

    def _rest(self, score: Tensor, fine: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """Summaries that complete the partition, as coarse as they can be, but for the best `middle` regions."""
        whole, split, scores = [visible], [fine], score.masked_fill(fine | ~visible, -torch.inf)
        for level in range(2, self.levels.top + 1):
            ratio = self.levels.ratio(level)
            wide = (0, -whole[-1].shape[-1] % ratio)
            here = F.pad(whole[-1], wide).unflatten(-1, (-1, ratio)).all(-1)
            apart = F.pad(split[-1], wide).unflatten(-1, (-1, ratio)).any(-1) | ~here
            scores = F.pad(scores, wide, value=-torch.inf).unflatten(-1, (-1, ratio)).logsumexp(-1)
            scores = scores.masked_fill(apart, -torch.inf)
            best = scores.sort(dim=-1, descending=True, stable=True)
            few = min(self.middle, scores.shape[-1])
            keep = torch.zeros_like(apart).scatter_(-1, best.indices[..., :few], best.values[..., :few] > -torch.inf)
            scores = scores.masked_fill(keep, -torch.inf)
            whole.append(here)
            split.append(apart | keep)
        read = []
        for level, (there, apart) in enumerate(zip(whole, split, strict=True), start=1):
            one = there & ~apart
            if level < self.levels.top:
                one = one & split[level].repeat_interleave(self.levels.ratio(level + 1), -1)[..., : one.shape[-1]]
            read.append(one)
        return tuple(read)

    def limits(self, chunks: int) -> list[int]:
        """Most summaries of each level but the coarsest that one block reads."""
        if self.rest == "drop":
            return []
        most = self.budget // self.levels.chunk + self.middle + 4  # first region, borders of window and text
        found = []
        for level in range(1, self.levels.top):
            count = chunks * self.levels.chunk // self.levels.sizes[level]
            found.append(min(count, most * self.levels.ratio(level + 1)))
        return found

    def at_most(self, tokens: int, chunks: int) -> int:
        """Entries outside the window that are gathered for one block."""
        fine = 2 * self.levels.chunk + min(self.budget, tokens)
        rest = 0 if self.rest == "drop" else sum(self.limits(chunks)) + tokens // self.levels.sizes[-1] + 1
        return fine + rest
