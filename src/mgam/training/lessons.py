"""Lessons: which query blocks of a text are learned from, and what the teacher did there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgam.cover import window_start
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from mgam.training.network import Lesson
from mgam.training.teacher import Seen, chunk_masses, watching


@dataclass(frozen=True)
class Sampling:
    """How query blocks of a text are drawn."""

    levels: Levels
    window: int = 512
    block: int = 128
    blocks: int = 12
    """Blocks learned from in each text."""
    voters: int = 32
    """Queries of a block that vote in a lesson."""
    last: int = 1
    """Blocks at the end of a text that are always among them: where a question stands, if there is one."""

    @property
    def shortest(self) -> int:
        """Tokens that a text must have so that there is something to choose: window, sink, and some chunks."""
        return self.window + 16 * self.levels.chunk + 2 * self.block

    def draw(self, tokens: int, rng: torch.Generator) -> list[tuple[int, bool]]:
        """Where blocks begin, and whether the queries before a block decide (else its own)."""
        first = -(-(self.window + 8 * self.levels.chunk) // self.block)
        stop = tokens // self.block
        order = (first + torch.randperm(stop - first, generator=rng)).tolist()
        ending = [tokens - self.block * (number + 1) for number in range(self.last)]
        starts = ending + [place * self.block for place in order[: max(0, self.blocks - self.last)]]
        ahead = torch.rand(len(starts), generator=rng) < 0.5
        return sorted(zip(starts, ahead.tolist(), strict=True))

    def voters_of(self, start: int, before: bool, rng: torch.Generator) -> Tensor:
        """Positions of the voters of a block (V,)."""
        first = max(0, start + 1 - self.block) if before else start
        span = start + 1 - first if before else self.block
        return first + torch.randperm(span, generator=rng)[: self.voters].sort().values


@torch.no_grad()
def lessons_of(model: Any, ids: Tensor, seeds: Sequence[int], sampling: Sampling) -> dict[int, list[Lesson]]:
    """What each full-attention layer did with texts ids (B, T): one lesson per layer and text.

    `seeds` (B,) decide which blocks are drawn: a text gives the same lessons whenever it comes.
    """
    found: dict[int, list[Lesson]] = {}
    tokens = ids.shape[1]
    plans = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        drawn = sampling.draw(tokens, rng)
        voters = torch.stack([sampling.voters_of(start, before, rng) for start, before in drawn])
        plans.append((torch.tensor([start for start, _ in drawn]), voters))

    starts = torch.stack([start for start, _ in plans]).to(ids.device)
    voters = torch.stack([voter for _, voter in plans]).to(ids.device)
    visible = (window_start(starts, sampling.window, sampling.levels) // sampling.levels.chunk).to(ids.device)

    def visit(seen: Seen) -> None:
        found[seen.layer] = _lessons(seen, starts, voters, visible, sampling)

    decoder = model.get_decoder()
    with watching(model, visit):
        decoder(input_ids=ids, use_cache=False)
    return found


def _lessons(seen: Seen, starts: Tensor, voters: Tensor, visible: Tensor, sampling: Sampling) -> list[Lesson]:
    """One layer's lesson from each text: starts and visible (B, N), voters (B, N, V)."""
    levels = sampling.levels
    rows, blocks, votes = voters.shape
    places = (starts[..., None] + torch.arange(sampling.block, device=starts.device)).flatten(1)
    served = chunk_masses(seen, places, levels.chunk)  # (B, H, G, N*block, C)
    wanted = served.sum(2).unflatten(2, (blocks, sampling.block)).sum(3).transpose(1, 2)  # (B, N, H, C)
    own = chunk_masses(seen, voters.flatten(1), levels.chunk).mean(2)  # (B, H, N*V, C)
    target = own.unflatten(2, (blocks, votes)).transpose(1, 2)  # (B, N, H, V, C)
    index = voters.flatten(1)[:, None, :, None].expand(-1, seen.queries.shape[1], -1, seen.queries.shape[3])
    queries = seen.queries.gather(2, index).unflatten(2, (blocks, votes)).transpose(1, 2)  # (B, N, H*G, V, D)
    search = Pyramid.of(seen.keys, seen.keys, Levels((1, levels.chunk), levels.search)).search
    assert search is not None
    whole = search.shape[3]
    scale = torch.full((search.shape[1],), seen.scale, device=search.device)
    return [
        Lesson(queries[row], search[row], visible[row], target[row, ..., :whole], wanted[row, ..., :whole], scale)
        for row in range(rows)
    ]
