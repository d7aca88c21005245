"""Policies that open the best chunks by some judgement: what a published method adds is how it judges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mgam.cover import Cover, Known, cover_of, windows
from mgam.levels import Levels
from mgam.policies.base import Rest, Voters, at_most
from mgam.policies.scored import highest
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks


@dataclass(frozen=True)
class Ranked(ABC):
    """Opens the `budget // chunk` chunks that are judged best between sink and window."""

    budget: int = 1024
    window: int = 512
    rest: Rest = "drop"
    mass: float = 1.0
    sink: bool = True
    """Whether the first chunk is opened besides."""
    per_head: bool = False
    """Whether each query head chooses for itself; else the heads of a group choose together."""

    votes = True
    adds_up: ClassVar[bool] = False
    """Whether a sum of queries judges as its queries do together: then voters are summed before they judge."""

    @abstractmethod
    def judge(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Tensor:
        """How good each of the first `chunks` chunks is for each query: (N, H, G, V, chunks), any scale."""

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers for N blocks within the budget."""
        assert voters is not None
        device = pyramid.keys[0].device
        begin, start = windows(blocks, self.window, levels, device)
        chunks = int(begin.max()) // levels.chunk if len(blocks) else 0
        most, first = self.budget // levels.chunk, int(self.sink)
        heads = voters.queries.shape[1] if self.per_head else pyramid.keys[0].shape[1]
        number = torch.arange(chunks, device=device)
        allowed = (number >= first) & ((number + 1) * levels.chunk <= start[:, None])
        opened = allowed[:, None].expand(-1, heads, -1).clone()
        if not most:
            opened &= False
        elif chunks - first > most:
            scores = self.scores(voters, blocks, pyramid, levels, chunks).masked_fill(~allowed[:, None], -torch.inf)
            opened &= highest(scores, most)
        cover = cover_of(opened, start, levels, rest=self.rest, mass=self.mass, most=first + most, sink=self.sink)
        return cover if self.rest != "drop" else replace(cover, known=Known(begin, cover.width))

    def scores(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Tensor:
        """Judgements (N, heads, chunks) in float32 or finer, summed over those who choose together."""
        if self.adds_up:
            wide = torch.promote_types(voters.queries.dtype, torch.float32)
            summed = voters.queries.masked_fill(~voters.live[:, None, :, None], 0).sum(2, keepdim=True, dtype=wide)
            voters = Voters(summed, torch.ones_like(voters.live[:, :1]))
        found = self.judge(voters, blocks, pyramid, levels, chunks)
        found = (found * voters.live[:, None, None, :, None]).sum(3)
        return found.flatten(1, 2) if self.per_head else found.sum(2)

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Sink, budget, and the summaries around what is opened."""
        return at_most(self.budget, self.rest, tokens, levels)


@dataclass(frozen=True)
class ByMean(Ranked):
    """A chunk is as good as its mean key's logit: the gate of MoBA (Lu et al. 2025, arXiv 2502.13189)."""

    adds_up = True

    def judge(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Tensor:
        """The means are level 1 of the pyramid."""
        return dots(voters.queries, pyramid.keys[1], blocks, chunks)


@dataclass(frozen=True)
class ByBound(Ranked):
    """A chunk is as good as any key inside the box of its keys could be: the bound of Quest (Tang et al. 2024)."""

    def judge(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Tensor:
        """sum_d max(q_d min_d, q_d max_d), which no logit of a key in the chunk exceeds."""
        box = Boxes.of(pyramid, levels)
        queries = voters.queries
        above = dots(queries.clamp_min(0), box.high, blocks, chunks)
        return above + dots(queries.clamp_max(0), box.low, blocks, chunks)


@dataclass
class Boxes:
    """Smallest and largest coordinate of the keys of every complete chunk: (B, H, C, D) each."""

    low: Tensor
    high: Tensor
    chunks: list[int]

    @classmethod
    def of(cls, pyramid: Pyramid, levels: Levels) -> Boxes:
        """Kept with the pyramid and extended as it grows."""
        kept = pyramid.derived.get(cls)
        if not isinstance(kept, Boxes):
            empty = pyramid.keys[0][:, :, :0].detach()
            kept = cls(empty, empty, [0] * len(pyramid.lengths))
            pyramid.derived[cls] = kept
        kept._extend(pyramid, levels)
        return kept

    def _extend(self, pyramid: Pyramid, levels: Levels) -> None:
        room = pyramid.keys[1].shape[2]
        targets = [length // levels.chunk for length in pyramid.lengths]
        if room > self.low.shape[2]:
            self.low, self.high = (_wider(side, room) for side in (self.low, self.high))
        together = len({*zip(self.chunks, targets, strict=True)}) == 1
        for row in range(1 if together else len(targets)):
            first, last = self.chunks[row], targets[row]
            if first < last:
                rows = slice(0, len(targets)) if together else slice(row, row + 1)
                index = torch.arange(first, last, device=self.low.device).expand(
                    rows.stop - rows.start, self.low.shape[1], -1
                )
                numbers = torch.arange(rows.start, rows.stop, device=self.low.device)
                keys, _ = pyramid.chunks(numbers, index, torch.zeros_like(numbers))
                keys = keys.detach().unflatten(2, (last - first, levels.chunk))
                self.low[rows, :, first:last] = keys.amin(3)
                self.high[rows, :, first:last] = keys.amax(3)
        self.chunks = [max(pair) for pair in zip(self.chunks, targets, strict=True)]


def dots(queries: Tensor, states: Tensor, blocks: Blocks, chunks: int) -> Tensor:
    """Products (N, H, G, V, chunks), in float32 or finer, of each block's queries (N, H*G, V, D) with the first chunks
    of its row in states (B, H, C, D)."""
    heads, wide = states.shape[1], torch.promote_types(queries.dtype, torch.float32)
    folded = queries.unflatten(1, (heads, -1)).to(wide)
    rows = blocks.row.tolist()
    if rows == [*range(len(states))]:  # as when a token is generated for each
        return torch.einsum("nhgvd,nhcd->nhgvc", folded, states[:, :, :chunks].to(wide))
    return torch.cat(
        [
            torch.einsum("nhgvd,hcd->nhgvc", folded[first:last], states[rows[first], :, :chunks].to(wide))
            for first, last in blocks.runs()
        ]
    )


def _wider(states: Tensor, room: int) -> Tensor:
    wider = states.new_empty(*states.shape[:2], room, states.shape[3])
    wider[:, :, : states.shape[2]] = states
    return wider
