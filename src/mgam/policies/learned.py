"""The learned policy: small projections of queries and keys, fitted to a model, decide what is read at which level.

The search (`mgam.policies.learned_search`) predicts the mass that each chunk will get. This decides three things: which
chunks are opened as tokens, which regions of the rest are read as fine summaries, and, with a `mark`, how many tokens a
block deserves.

A part of the budget (`content`) goes to what the search finds whatever the distance, and the rest to what is expected.
Few heads look facts up, and what these need differs from what the others read: each KV head has its own part, which is
measured on texts with questions (`mgam.training.content`).

The lightning indexer of DeepSeek-V3.2 and the gates of SeerAttention (arXiv 2410.13276) are fitted by distillation too;
they choose tokens or blocks of one level, and do not predict a budget.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgam.cover import Cover, Known, indices, refine, summaries_at_most, windows
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies.base import WHOLE, Rest, Voters, at_most
from mgam.policies.learned_search import LearnedKeys, SearchWeights, distances, search_masses
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, sent

FEWEST = 4
"""Voters of a larger block that are always heard, however few of them are to be."""
EXPECTED = 0.1
"""Weight of what is expected in the list of what is found: it decides where nothing stands out."""


@dataclass(frozen=True)
class Learned:
    """Levels by predicted attention mass, once per KV head."""

    weights: SearchWeights
    budget: int = 1024
    window: int = 512
    rest: Rest = "summaries"
    mass: float = 1.0
    mark: float | None = None
    """Least worth of an opened chunk: the share of all attention that it is expected to get, times the head's
    importance. Blocks that look nearby open little, and heads that matter little too. One mark for all blocks, heads
    and layers spends a mean cost where it counts. None: every block spends its whole budget."""
    content: float | None = None
    """Part of the budget, from 0 to 1, for what the search finds whatever the distance; the rest is for the attention
    which is expected, of which distance is a part. None: each KV head has the part that was fitted."""
    thin: int = 32
    """One of so many voters of a large block is heard: those that care most for the far past."""
    whole: int = WHOLE
    """Blocks of at most so many voters are heard in full: those of questions, which are few and look things up."""
    middle: int = 0
    """Entries of the budget that go to regions which are read as fine summaries instead of coarse ones."""

    votes = True

    def __post_init__(self) -> None:
        if self.mark is not None and not 0 <= self.mark <= 1:
            raise SettingError(f"mark={self.mark} is a share of attention, from 0 to 1, or None")
        if self.thin < 1 or self.whole < 0 or not 0 <= self.middle <= self.budget:
            raise SettingError(
                f"thin={self.thin} starts at 1, whole={self.whole} at 0; middle={self.middle} lies from 0 to the budget"
            )
        if self.content is not None and not 0 <= self.content <= 1:
            raise SettingError(f"content={self.content} is a part of the budget, from 0 (attention alone) to 1")

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers for N blocks within the budget."""
        assert voters is not None
        device, heads = pyramid.keys[0].device, pyramid.keys[0].shape[1]
        begin, start = windows(blocks, self.window, levels, device)
        chunks = int(blocks.decide.max()) // levels.chunk if len(blocks) else 0
        most = min((self.budget - self.middle) // levels.chunk, chunks)
        allowed = openable(start, chunks, levels)[:, None].expand(-1, heads, -1)
        if chunks - 1 <= most and self.mark is None:
            shares, opened = None, allowed.clone()
        else:
            shares, wherever = self.shares(voters, blocks, pyramid, levels, chunks)
            opened = self.open(shares, wherever, allowed, most)
        if chunks:
            opened[..., 0] = start[:, None] > 0
        chosen = indices(opened, min(1 + most, chunks))
        if self.rest == "drop":
            none = torch.empty(len(blocks), heads, 0, dtype=torch.int64, device=device)
            known = Known(begin, chosen.shape[-1] * levels.chunk)
            return Cover(levels, start, chosen, (none,) * levels.top, self.mass, known)
        keep, kept = self._middle(shares, opened, start, levels)
        limits = summaries_at_most(chunks, 1 + most + kept, levels)
        limits = [limit + kept * 2 for limit in limits]
        found = refine(opened, start, levels, keep=keep)
        lists = tuple(indices(read, limit) for read, limit in zip(found, limits, strict=True))
        known = Known(begin, chosen.shape[-1] * levels.chunk + sum(part.shape[-1] for part in lists))
        return Cover(levels, start, chosen, lists, self.mass, known)

    def shares(
        self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int
    ) -> tuple[Tensor, Tensor]:
        """Share of all attention that each chunk before the window is expected to get, and the share that it would
        get by what it holds, wherever it stood; both (N, H, chunks), in float32 or finer, and what is missing to 1 is
        expected for the window.
        """
        device = voters.queries.device
        kinds = blocks.once(("kinds", self.whole, device), lambda: blocks.apart(blocks.voting > self.whole, device))
        if not kinds:
            return self._shares(voters, blocks, pyramid, levels, chunks)
        parts = [(place, self._shares(voters[place], some, pyramid, levels, chunks)) for place, some, _ in kinds]
        first = parts[0][1][0]
        found, wherever = (first.new_empty(len(blocks), *first.shape[1:]) for _ in range(2))
        for place, part in parts:
            found[place], wherever[place] = part
        return found, wherever

    def _shares(
        self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int
    ) -> tuple[Tensor, Tensor]:
        """The same of blocks that are all heard in part, or all in full."""
        queries, live = self._heard(voters, blocks)
        asked = self.weights.ask(queries)  # (N, H, s, V, r)
        kept = LearnedKeys.of(pyramid, levels, self.weights)
        visible = 1 + windows(blocks, self.window, levels, queries.device)[1] // levels.chunk
        found = search_masses(asked, live, kept.search, blocks.row, visible, 1 + chunks)
        near, found = found[..., :1], found[..., 1:]
        if not chunks:
            return found, found
        far = blocks.once(
            ("distance", self.window, levels, chunks, found.device), lambda: distances(visible - 1, chunks)
        )
        expected = self.weights.by_distance(far.to(found.device)).to(found.dtype).exp() * found
        tiny, whole = torch.finfo(found.dtype).tiny, expected.sum(-1, keepdim=True)
        every = blocks.once(
            ("every", levels, found.device), lambda: sent(1 + blocks.decide.cpu() // levels.chunk, found.device)
        )
        wherever = search_masses(self.weights.look(queries), live, kept.search, blocks.row, every, 1 + chunks)[..., 1:]
        before = torch.arange(1, 1 + chunks, device=found.device) < visible.to(found.device)[:, None]
        wherever = wherever * before[:, None]
        wherever = wherever * (whole / wherever.sum(-1, keepdim=True).clamp_min(tiny))
        return expected / (near + whole).clamp_min(tiny), wherever / (near + whole).clamp_min(tiny)

    def _heard(self, voters: Voters, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """The voters that are heard: queries (N, H*G, V', D), and (N, V') which of them are there.

        Each KV head hears those that it expects to care most for the far past.
        """
        width = int(blocks.voting.max())
        queries, live = voters.queries[:, :, :width], voters.live[:, :width]
        most, few = blocks.once(
            ("heard", self.thin, self.whole, live.device), lambda: self._limits(blocks, live.device)
        )
        if few >= live.shape[1]:
            return queries, live
        voices = self.weights.voices(queries).masked_fill(~live[:, None], -torch.inf)
        chosen = voices.sort(dim=-1, descending=True, stable=True).indices[..., :few]
        group = queries.shape[1] // chosen.shape[1]
        place = chosen.repeat_interleave(group, 1)[..., None].expand(-1, -1, -1, queries.shape[3])
        there = torch.minimum(live.sum(1), most)[:, None]
        return queries.gather(2, place), torch.arange(few, device=live.device) < there

    def _limits(self, blocks: Blocks, device: torch.device) -> tuple[Tensor, int]:
        """How many voters of each block are heard at most (N,), and the largest of these numbers."""
        count = blocks.voting
        some = (-(-count // self.thin)).clamp_min(FEWEST)
        most = torch.where(count <= self.whole, count, torch.minimum(some, count))
        return sent(most, device), int(most.max()) if len(blocks) else 0

    def open(self, shares: Tensor, wherever: Tensor, allowed: Tensor, most: int) -> Tensor:
        """The best chunks (N, H, C) bool: `most` of them, or with a `mark` those among them that are worth it."""
        opened = torch.zeros_like(allowed)
        if not most:
            return opened
        turns, worth = self._turns(shares, wherever, allowed)
        best = turns.sort(dim=-1, stable=True).indices[..., :most]
        wanted = allowed.gather(-1, best)
        if self.mark is not None:
            wanted &= worth.gather(-1, best) >= self.mark
        return opened.scatter_(-1, best, wanted)

    def _turns(self, shares: Tensor, wherever: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """When each chunk's turn comes to be opened, the lower the earlier, and what it is worth; both (N, H, C).

        Two lists are taken by turns, in the proportion of `content`: of n chunks about content * n are the first by
        what is found, and the others the first by what is expected. A chunk's turn is the earlier of its two. Where
        nothing stands out of what is found, the first list goes by what is expected too.
        """
        if self.content is None:
            part = self.weights.on(shares.device, shares.dtype).content[:, None].to(shares.dtype)
        else:
            part = torch.full((), self.content, dtype=shares.dtype, device=shares.device)
        turns, finds = [], torch.lerp(wherever, shares, EXPECTED)
        for values, share in ((finds, part), (shares, 1 - part)):
            order = values.masked_fill(~allowed, -1.0).sort(dim=-1, descending=True, stable=True).indices
            place = torch.arange(1, order.shape[-1] + 1, dtype=shares.dtype, device=shares.device).expand_as(shares)
            turns.append(torch.empty_like(shares).scatter_(-1, order, place) / share)
        first, second = turns
        worth = torch.where(first < second, finds, shares)
        worth = worth * self.weights.on(shares.device, shares.dtype).importance[:, None]
        return torch.minimum(first, second).masked_fill(~allowed, torch.inf), worth

    def _middle(
        self, shares: Tensor | None, opened: Tensor, start: Tensor, levels: Levels
    ) -> tuple[list[Tensor | None] | None, int]:
        """Per level 2 and up, regions to read as their children though nothing in them is opened; and how many."""
        if shares is None or not self.middle or levels.top < 2:
            return None, 0
        left = shares.masked_fill(opened, 0.0)
        keep: list[Tensor | None] = []
        most = 0
        for level in range(2, levels.top + 1):
            size, width = levels.sizes[level], levels.sizes[level] // levels.chunk
            count = -(-left.shape[-1] // width)
            wide = (0, count * width - left.shape[-1])
            parts = torch.nn.functional.pad(left, wide).unflatten(-1, (count, width)).unbind(-1)
            region = functools.reduce(torch.add, parts)  # in one order whatever the shape: equal regions must tie
            split = torch.nn.functional.pad(opened, wide).unflatten(-1, (count, width)).any(-1)
            whole = (torch.arange(1, count + 1, device=start.device) * size)[None, None] <= start[:, None, None]
            region = region.masked_fill(split | ~whole, -1.0)
            few = min(count, self.middle // (levels.top - 1) // levels.ratio(level))
            ranked = region.sort(dim=-1, descending=True, stable=True)
            chosen = torch.zeros_like(split).scatter_(-1, ranked.indices[..., :few], ranked.values[..., :few] > 0)
            keep.append(chosen)
            most += few
        return keep, most

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Sink, budget, and the summaries around what is opened."""
        return at_most(self.budget, self.rest, tokens, levels)


def openable(start: Tensor, chunks: int, levels: Levels) -> Tensor:
    """Which of `chunks` chunks stand between the sink and windows that begin at start (N,): (N, chunks) bool."""
    number = torch.arange(chunks, device=start.device)
    return (number > 0) & ((number + 1) * levels.chunk <= start[:, None])


@dataclass(frozen=True)
class LearnedLayers:
    """The learned policies of a model's layers, which differ; a layer reads with its own."""

    layers: Mapping[int, Learned]

    @classmethod
    def of(cls, weights: Mapping[int, SearchWeights], **dials: Any) -> LearnedLayers:
        """One policy per layer, with the same dials."""
        return cls({layer: Learned(one, **dials) for layer, one in weights.items()})

    def at(self, layer: int) -> Learned:
        """The policy of one layer."""
        return self.layers[layer]
