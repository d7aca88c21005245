"""The search of the learned policy: short queries, short keys, and the mass that they give each chunk.

Each layer and KV head has a few search dimensions: the principal directions of its keys, as its queries weigh them. The
means of about four keys become short search keys; a chunk's logit is that of its best search key. Two kinds of short
queries search among them. Those of the first kind are fitted: the G query heads of a group are projected together into
one (or a few), and what they find is expected attention. One more dimension holds a query's pull towards what is near:
it competes in the same softmax, so that the mass of a chunk is a share of all attention, and a voter that looks nearby
has little to say about the far past. What distance alone tells is learned apart, since keys are searched before
rotation.

A single fact far back never wins against what is near and likely, and full attention itself, near the end of the window
that it was trained for, does not point at it. So there are short queries of a second kind, one for each query head: the
query itself in the same dimensions, which finds what whole queries and keys would find, whatever the distance. What is
fitted to texts in which facts are hidden learns how such facts look rather than to find them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mgam import kernels
from mgam.lasting import lasting
from mgam.levels import Levels
from mgam.policies.asked import Asked
from mgam.policies.scored import TILE
from mgam.pyramid import Pyramid

ELEMENTS = 1 << 22
"""Logits worked out at a time without kernels."""
NEVER = -1e4
"""Pull of what is near where there is none."""
PARTS = ("query", "query_bias", "key", "key_bias", "seek", "voice", "voice_bias", "prior", "content", "importance")
"""The tensors of a search."""


@dataclass(frozen=True, eq=False)
class SearchWeights:
    """The search of one layer.

    Shapes (H KV heads of G query heads each, D head dim, s search queries per position, r search dimensions, of which
    the last is the pull of what is near): query (H, G*D, s*r), query_bias (H, s*r), key (H, D, r-1), key_bias (H, r-1),
    seek (H, D, r-1), voice (H, G*D), voice_bias (H,), prior (H, K), content (H,), importance (H,).
    """

    name: str
    """Tells the search keys of this layer from those of other policies."""
    slots: int
    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    seek: Tensor
    """Turns each query head's own query into the dimensions of the search, scaled as its logits are."""
    voice: Tensor
    voice_bias: Tensor
    prior: Tensor
    """What distance alone tells of a chunk: a logit at 1, 2, 4 ... 2^(K-1) chunks before the window, and between them
    by the logarithm of the distance. Farther than was fitted it falls with the distance, so that all that lies twice as
    far holds no more than all that lies once as far: else what is far wins by its number as a text grows."""
    content: Tensor
    """Part of the budget that goes to what the search finds whatever the distance, from 0 to 1."""
    importance: Tensor
    """What a share of a head's attention is worth to the model, beside that of other heads: a `mark` asks for it."""

    @property
    def width(self) -> int:
        """Search dimensions r."""
        return self.key.shape[-1] + 1

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], SearchWeights]:
        return {}

    def on(self, device: torch.device, dtype: torch.dtype) -> SearchWeights:
        """The same weights on a device, in float32 or finer."""
        wide = torch.promote_types(dtype, torch.float32)
        if (device, wide) not in self._placed:
            with lasting():
                moved = {name: getattr(self, name).to(device, wide) for name in PARTS}
            self._placed[device, wide] = replace(self, **moved)
        return self._placed[device, wide]

    def ask(self, queries: Tensor) -> Tensor:
        """Search queries (N, H, s, V, r) of queries (N, H*G, V, D), in float32 or finer."""
        there = self.on(queries.device, queries.dtype)
        asked = torch.einsum("nhvx,hxr->nhvr", self.joined(queries), there.query) + there.query_bias[:, None]
        return asked.unflatten(-1, (self.slots, self.width)).movedim(3, 2)

    def look(self, queries: Tensor) -> Tensor:
        """Search queries (N, H, G, V, r) of each query head itself, which what is near does not pull."""
        there = self.on(queries.device, queries.dtype)
        own = queries.to(there.seek.dtype).unflatten(1, (there.seek.shape[0], -1))
        return torch.nn.functional.pad(torch.einsum("nhgvd,hdr->nhgvr", own, there.seek), (0, 1), value=NEVER)

    def voices(self, queries: Tensor) -> Tensor:
        """How much each voter is expected to care for the far past (N, H, V): a logit."""
        there = self.on(queries.device, queries.dtype)
        return torch.einsum("nhvx,hx->nhv", self.joined(queries), there.voice) + there.voice_bias[:, None]

    def keys(self, search: Tensor) -> Tensor:
        """Short search keys (..., H, S, C, r) of search keys (..., H, S, C, D); 0 in the dimension of what is near."""
        there = self.on(search.device, search.dtype)
        short = torch.einsum("...hscd,hdr->...hscr", search.to(there.key.dtype), there.key)
        return torch.nn.functional.pad(short - there.key_bias[:, None, None], (0, 1))

    def by_distance(self, distance: Tensor) -> Tensor:
        """Logits (N, H, C) of chunks at a distance (N, C), in chunks, 1 or more, before a window."""
        prior = self.on(distance.device, torch.float32).prior
        last = prior.shape[1] - 1
        far = distance.to(prior.dtype).log2()
        place = far.clamp_max(last)
        low = place.floor().long().clamp_max(max(last - 1, 0))
        high = (low + 1).clamp_max(last)
        part = (place - low).clamp(0, 1)
        fitted = prior[:, low] * (1 - part) + prior[:, high] * part
        return (fitted - math.log(2) * (far - place)).transpose(0, 1)

    def joined(self, queries: Tensor) -> Tensor:
        """Queries (N, H*G, V, D) with the heads of a group side by side: (N, H, V, G*D)."""
        count, _, votes, dim = queries.shape
        heads = self.query.shape[0]
        wide = torch.promote_types(queries.dtype, torch.float32)
        return queries.to(wide).reshape(count, heads, -1, votes, dim).transpose(2, 3).flatten(3)


@dataclass
class LearnedKeys:
    """Short search keys of a pyramid: (B, H, S, 1 + C, r), of which the first chunk stands for what is near."""

    search: Tensor
    chunks: list[int]
    """Chunks of each row that were shortened."""

    @classmethod
    def of(cls, pyramid: Pyramid, levels: Levels, weights: SearchWeights) -> LearnedKeys:
        """Those of all complete chunks; kept with the pyramid and extended as it grows."""
        assert pyramid.search is not None
        key = ("learned", weights.name)
        kept = pyramid.derived.get(key)
        if not isinstance(kept, LearnedKeys):
            batch, heads, places = pyramid.search.shape[:3]
            near = pyramid.search.new_zeros(batch, heads, places, 1, weights.width)
            near[..., -1] = 1
            kept = cls(near, [0] * batch)
            pyramid.derived[key] = kept
        kept._extend(pyramid, [held // levels.chunk for held in pyramid.held], weights)
        return kept

    def _extend(self, pyramid: Pyramid, targets: list[int], weights: SearchWeights) -> None:
        assert pyramid.search is not None
        if 1 + max(targets) > self.search.shape[3]:
            room = 1 + max(pyramid.search.shape[3], max(targets))
            wider = self.search.new_zeros(*self.search.shape[:3], room, self.search.shape[4])
            wider[:, :, :, : self.search.shape[3]] = self.search
            self.search = wider
        together = len({*zip(self.chunks, targets, strict=True)}) == 1
        for row in range(1 if together else len(targets)):
            rows = slice(None) if together else slice(row, row + 1)
            first, last = self.chunks[row], targets[row]
            if first < last:
                self.search[rows, :, :, 1 + first : 1 + last] = weights.keys(pyramid.search[rows, :, :, first:last])
        self.chunks = [max(pair) for pair in zip(self.chunks, targets, strict=True)]


def distances(visible: Tensor, chunks: int) -> Tensor:
    """Chunks from each of `chunks` chunks to the windows (N, chunks), of which `visible` (N,) stand before it; 1 where
    a chunk is none of these."""
    return (visible[:, None] - torch.arange(chunks, device=visible.device)).clamp_min(1)


def search_masses(asked: Tensor, live: Tensor, search: Tensor, row: Tensor, visible: Tensor, chunks: int) -> Tensor:
    """Mean mass (N, H, chunks) that voters give each chunk.

    Shapes: asked (N, H, s, V, r), live (N, V), search (B, H, S, >=chunks, r), row and visible (N,).
    """
    count, heads, slots = asked.shape[:3]
    heard = live.sum(1).clamp_min(1)[:, None, None] * slots
    row, visible = row.to(asked.device), visible.to(asked.device)
    folded = asked.flatten(2, 3)
    if kernels.serve(search):
        from mgam.policies import search_triton

        factor = torch.full(folded.shape[:3], math.log2(math.e), dtype=torch.float32, device=asked.device)
        question = Asked(folded.to(search.dtype).contiguous(), factor, live, search, row, visible)
        return search_triton.scores(question, chunks) / heard
    found = torch.zeros(count, heads, chunks, dtype=asked.dtype, device=asked.device)
    hidden = torch.arange(chunks, device=asked.device)[None] >= visible[:, None]
    votes = folded.shape[2]
    step = max(1, ELEMENTS // max(1, heads * votes * max(chunks, TILE * search.shape[2])))
    for at, first, last in _stretches(row.tolist(), step):
        part = slice(first, last)
        best = best_logits(folded[part].transpose(0, 1).flatten(1, 2), search[at], chunks)
        best = best.unflatten(1, (last - first, votes)).transpose(0, 1)  # (n, H, s*V, chunks)
        mass = torch.softmax(best.masked_fill(hidden[part, None, None], -torch.inf), -1)
        found[part] = (mass * live[part].repeat(1, slots)[:, None, :, None]).sum(2)
    return found / heard


def _stretches(rows: list[int], step: int) -> list[tuple[int, int, int]]:
    """Row, first and last (exclusive) of blocks that follow one another in one row, at most `step` at a time."""
    found, first = [], 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[first] or place - first == step:
            found.append((rows[first], first, place))
            first = place
    return found


def best_logits(asked: Tensor, search: Tensor, chunks: int) -> Tensor:
    """Logit of the best search key of each chunk: asked (H, M, r), search (H, S, >=chunks, r) -> (H, M, chunks)."""
    best = torch.empty(*asked.shape[:2], chunks, dtype=asked.dtype, device=asked.device)
    for first in range(0, chunks, TILE):
        tile = search[:, :, first : min(first + TILE, chunks)].to(asked.dtype)
        logits = asked @ tile.flatten(1, 2).transpose(1, 2)
        best[..., first : first + TILE] = logits.unflatten(-1, tile.shape[1:3]).amax(-2)
    return best
