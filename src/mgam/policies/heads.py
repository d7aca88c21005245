"""LongHeads: a key per chunk and query head, made from the attention inside the chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies.base import Heard, Voters
from mgam.policies.ranked import Ranked, dots
from mgam.positions import Positions, rotate
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

ELEMENTS = 1 << 24
"""Attention weights written out at a time."""


@dataclass(frozen=True)
class ByChunkKey(Ranked):
    """A chunk is as good as the product of its own key with the query, which stands at position 0 (Lu et al. 2024)."""

    adds_up = True

    def observe(self, heard: Heard, pyramid: Pyramid) -> None:
        """Makes the keys of chunks that became complete."""
        kept = pyramid.carried.get(ChunkKeys)
        if not isinstance(kept, ChunkKeys):
            kept = ChunkKeys(pyramid.levels.chunk, heard)
            pyramid.carried[ChunkKeys] = kept
        kept.extend(heard, pyramid)

    def judge(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Tensor:
        """q . C, without scale."""
        kept = pyramid.carried[ChunkKeys]
        assert isinstance(kept, ChunkKeys)
        found = dots(voters.queries, kept.keys, blocks, chunks)
        return found.flatten(1, 2).unflatten(1, (pyramid.keys[0].shape[1], -1))


class ChunkKeys:
    """Keys of the complete chunks (B, H*G, C, D), and the queries that are still needed for the next one.

    With all rotated by their places inside the chunk: each query of the chunk attends to the whole chunk; the mean of
    what comes out asks the chunk's keys once more, and the mean of keys that it reads is the chunk's key.
    """

    def __init__(self, chunk: int, heard: Heard) -> None:
        like, before = heard.queries, heard.before
        if any(before):
            raise SettingError("longheads must see a text from its first token on; begin with an empty cache")
        self.chunk = chunk
        self.keys = like.new_empty(like.shape[0], like.shape[1], 0, like.shape[3])
        self.begin = [0] * len(before)
        self.tail: list[list[Tensor]] = [[] for _ in before]
        """Queries (H*G, n, D) of each row from position `begin[b]` on, as they came: those of the open chunk and of the
        one before it."""

    def extend(self, heard: Heard, pyramid: Pyramid) -> None:
        """Takes the queries of a call and makes the keys of the chunks that it completes."""
        self._widen(max(pyramid.lengths) // self.chunk)
        step = max(1, ELEMENTS // (heard.queries.shape[1] * self.chunk**2))
        for row, (old, new) in enumerate(zip(heard.before, pyramid.lengths, strict=True)):
            if old == new:
                continue
            came = heard.between(row, old, new)
            done, complete = old // self.chunk, new // self.chunk
            if done == complete:  # the caller may write over its queries, and one of many columns must not keep them
                self.tail[row] = [*self.tail[row], came.clone()]
                continue
            known = torch.cat((*self.tail[row], came), 1)
            for low in range(done, complete, step):
                high = min(low + step, complete)
                part = known[:, low * self.chunk - self.begin[row] : high * self.chunk - self.begin[row]]
                made = _chunk_keys(part.unflatten(1, (high - low, self.chunk)), row, low, pyramid, heard.positions)
                self.keys[row, :, low:high] = made
            begin = max(0, complete - 1) * self.chunk
            self.tail[row] = [known[:, max(0, begin - self.begin[row]) :].clone()]
            self.begin[row] = max(begin, self.begin[row])

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        self.keys = self.keys.index_select(0, rows.to(self.keys.device))
        self.begin = [self.begin[row] for row in rows.tolist()]
        self.tail = [self.tail[row] for row in rows.tolist()]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forgets the last queries.

        Raises:
            SettingError: when queries of chunks that were closed are needed again.
        """
        for row, length in enumerate(lengths):
            if length // self.chunk * self.chunk < self.begin[row]:
                raise SettingError(
                    f"longheads keeps the queries of two chunks of {self.chunk} tokens, so a cache cannot be cropped "
                    f"to {length} tokens any more; read the text again"
                )
            if self.tail[row]:
                self.tail[row] = [torch.cat(self.tail[row], 1)[:, : length - self.begin[row]]]

    def _widen(self, chunks: int) -> None:
        if chunks > self.keys.shape[2]:
            room = max(chunks, self.keys.shape[2] + self.keys.shape[2] // 4)
            wider = self.keys.new_empty(*self.keys.shape[:2], room, self.keys.shape[3])
            wider[:, :, : self.keys.shape[2]] = self.keys
            self.keys = wider


def _chunk_keys(queries: Tensor, row: int, low: int, pyramid: Pyramid, positions: Positions) -> Tensor:
    """Keys (H*G, n, D) of n chunks from number `low` on; queries (H*G, n, w, D)."""
    heads, count, chunk, _ = queries.shape
    index = torch.arange(low, low + count, device=queries.device).expand(1, pyramid.keys[0].shape[1], -1)
    rows = torch.full((1,), row, device=queries.device)
    keys, values = (
        part[0].detach().unflatten(1, (count, chunk)) for part in pyramid.chunks(rows, index, torch.zeros_like(rows))
    )
    if positions.rotary is not None:
        cos, sin = positions.rotary.table(queries.device, queries.dtype)
        queries, keys = (rotate(states, cos[:chunk], sin[:chunk]) for states in (queries, keys))
    group = heads // keys.shape[0]
    grouped = queries.unflatten(0, (-1, group))
    keys, values = keys[:, None].expand(-1, group, -1, -1, -1), values[:, None].expand(-1, group, -1, -1, -1)
    attended = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values)
    asking = attended.mean(-2, keepdim=True)
    return torch.nn.functional.scaled_dot_product_attention(asking, keys, keys)[..., 0, :].flatten(0, 1)
