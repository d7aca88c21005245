"""What a policy thinks of each chunk of a text: a score per block of queries, KV head and chunk.

Scores by distance and at random look at places only; others at the queries and keys of the reading, or at
projections of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgam.levels import Levels

# Shape letters: B rows, T tokens, H KV heads, G query heads per KV head, N blocks of queries, V voters, C chunks, r.

FAR = 16
"""Distances are told apart by their logarithm, up to 2^16 chunks."""


@dataclass(frozen=True)
class Part:
    """Some blocks of a text and what stands before and after their windows, in tokens.

    Shapes: start, left, right (N,): first token of a block, first of its window, and the token after its window.
    """

    start: Tensor
    left: Tensor
    right: Tensor
    block: int
    chunk: int
    tokens: int
    causal: bool

    def voters(self, every: int) -> tuple[Tensor, Tensor]:
        """Positions (N, V) of the queries that have a say, and which of them are there.

        A causal block is decided by its first query and those before it, any other by its own queries.
        """
        step = torch.arange(0, self.block, every, device=self.start.device)
        place = self.start[:, None] + (-step if self.causal else step)
        return place.clamp(0, self.tokens - 1), (place >= 0) & (place < self.tokens)

    def distance(self, chunks: int) -> Tensor:
        """Chunks (N, C) from the window: -1, -2 ... before it, 1, 2 ... after it, 0 inside."""
        number = torch.arange(chunks, device=self.start.device)
        before = (number - self.left[:, None] // self.chunk).clamp_max(0)
        return before + (number + 1 - self.right[:, None] // self.chunk).clamp_min(0)


class LearnedScores(nn.Module):
    """A search of its own: short queries and keys, a pull of what is near, and what distance alone tells.

    It looks at states without gradient; what it learns from is a gate on the entries that are read.
    """

    def __init__(self, width: int, heads: int, dims: int) -> None:
        super().__init__()
        self.heads, self.dims = heads, dims
        self.ask = nn.Linear(width, heads * (dims + 1))
        self.find = nn.Linear(width, heads * dims, bias=False)
        self.prior = nn.Parameter(torch.zeros(2 * FAR, heads))

    def project(self, states: Tensor) -> dict[str, Tensor]:
        """Short queries (B, H, T, r+1), the last number the pull of what is near, and short keys (B, H, T, r)."""
        asked, found = self.ask(states.detach()), self.find(states.detach())
        return {name: part.unflatten(2, (self.heads, -1)).transpose(1, 2) for name, part in zip(
            ("ask", "find"), (asked, found), strict=True)}  # fmt: skip

    def searched(self, states: Tensor, chunks: int, levels: Levels, every: int) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels search with: every `every`-th short query (B, T/every, H*(r+1)), means of short keys
        (B, C*S, H*r), and what distance tells (2*FAR, H).

        Projections are linear, so a mean of keys is the key of a mean of states.
        """
        states = states.detach()
        spare = chunks * levels.chunk - states.shape[1]
        means = F.pad(states, (0, 0, 0, spare)) if spare else states
        means = means.unflatten(1, (-1, levels.search)).mean(2)
        return self.ask(states[:, ::every]), self.find(means), self.prior

    def forward(self, ask: Tensor, search: Tensor, part: Part, every: int) -> tuple[Tensor, Tensor]:
        """Scores (B, H, N, C) of chunks and (B, H, N) of what is near. `search` (B, H, C, S, r) are means of keys."""
        place, live = part.voters(every)
        voices = ask.index_select(2, place.flatten()).unflatten(2, place.shape)
        voters, chunks = place.shape[1], search.shape[2]
        wide = torch.promote_types(ask.dtype, torch.float32)
        logits = voices[..., :-1].flatten(2, 3) @ search.flatten(2, 3).transpose(-1, -2) * self.dims**-0.5
        heard = logits.unflatten(2, (-1, voters)).to(wide).masked_fill(~live[..., None], -torch.inf)
        over = heard.logsumexp(3).unflatten(-1, (chunks, -1)).logsumexp(-1)
        count = live.sum(-1, keepdim=True) * search.shape[3]
        distance = part.distance(chunks)
        row = distance.abs().clamp_min(1).log2().long().clamp_max(FAR - 1) + FAR * (distance > 0)
        near = (voices[..., -1].to(wide) * live).sum(-1) / live.sum(-1)
        prior = F.embedding(row, self.prior).permute(2, 0, 1).to(wide)
        return over - count.to(wide).log() + prior, near


def scored(asked: Tensor, search: Tensor, part: Part, every: int) -> Tensor:
    """The best product (B, H, N, C) of any voter, of any head of the group, with any of a chunk's search keys.

    Shapes: asked (B, H*G, T, D), search (B, H, C, S, D).
    """
    place, live = part.voters(every)
    heads, chunks = search.shape[1], search.shape[2]
    voices = asked[:, :, place].unflatten(1, (heads, -1)).movedim(2, 3)  # (B, H, N, G, V, D)
    logits = voices.flatten(2, 4) @ search.flatten(2, 3).transpose(-1, -2)
    heard = logits.unflatten(2, voices.shape[2:5]).masked_fill(~live[:, None, :, None], -torch.inf)
    return heard.amax((3, 4)).unflatten(-1, (chunks, -1)).amax(-1)


def at_random(part: Part, heads: int, chunks: int, seed: int) -> Tensor:
    """Scores (1, H, N, C) that look like chance and depend on block, chunk and head alone."""
    device, most = part.start.device, 2**31 - 1
    number = torch.arange(heads, device=device)[:, None, None] * 7919 + (part.start // part.block)[:, None] * 104729
    number = number + torch.arange(chunks, device=device) * 1299709 + (seed + 1) * 15485863
    for factor in (48271, 69621, 16807):
        number = (number % most * factor) % most ^ (number >> 7)
    return (number % most)[None].float() / most


def search_keys(states: Tensor, chunks: int, chunk: int, search: int) -> Tensor:
    """Means (B, H, C, S, D) of every `search` tokens of states (B, H, T, D), padded with zeros to whole chunks."""
    padded = F.pad(states, (0, 0, 0, chunks * chunk - states.shape[2]))
    return padded.unflatten(2, (chunks, chunk // search, search)).mean(4)
