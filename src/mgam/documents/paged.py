"""A pyramid of one row whose tokens are in a pool of pages; summaries and search keys stay in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.documents.pool import Pool
from mgam.documents.store.segment import Numbers
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks


class PagedPyramid(Pyramid):
    """One layer of a digest. keys[0] and values[0] stay empty: they only tell number format, device and heads.

    Args:
        layer: which of the pool's tables is its own.
        tokens: room to make for summaries and search keys.
    """

    in_memory = False

    def __init__(self, levels: Levels, pool: Pool, layer: int, tokens: int) -> None:
        super().__init__(levels)
        self.pool = pool
        self.layer = layer
        self.reserve(tokens)
        shape = pool.shape
        like = torch.empty(1, shape.heads, 0, shape.dim, dtype=pool.keys.dtype, device=pool.device)
        self.begin(like)
        self.grow(max(tokens, 1))

    @property
    def room(self) -> int:
        """Tokens that fit without growing."""
        assert self.search is not None
        return self.search.shape[3] * self.levels.chunk

    def chunks(self, row: Tensor, index: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, K*chunk, D) of the chunks `index` (N, H, K); padding is read from the first chunk."""
        count, heads, width = index.shape
        pages = index.clamp_min(0).cpu().numpy()
        kv_head = np.arange(heads) // (heads // self.pool.shape.heads)  # lists may be per query head
        head = np.broadcast_to(kv_head[None, :, None], pages.shape)
        return self._gather(head.reshape(-1), pages.reshape(-1), (count, heads, width * self.levels.chunk))

    def window(self, row: Tensor, start: Tensor, reach: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, reach, D) of the tokens from `start` (N,) on; beyond `last` (N,) they mean nothing."""
        chunk, heads = self.levels.chunk, self.pool.shape.heads
        first = start // chunk
        skip = start - first * chunk
        width = -(-(int(skip.max()) + reach) // chunk)
        pages = torch.minimum(first[:, None] + torch.arange(width, device=start.device), (last // chunk)[:, None])
        index = pages[:, None].expand(-1, heads, -1)
        keys, values = self.chunks(row, index, last)
        if not bool(skip.any()):
            return keys[:, :, :reach], values[:, :, :reach]
        place = (skip[:, None] + torch.arange(reach, device=start.device))[:, None, :, None]
        place = place.expand(-1, heads, -1, keys.shape[-1])
        return keys.gather(2, place), values.gather(2, place)

    def near(self, cover: Cover, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, K*chunk + W, D) of each block's opened chunks, then of its window, side by side."""
        chunk, heads = self.levels.chunk, self.pool.shape.heads
        first = cover.begin // chunk
        last = ((blocks.stop - 1).clamp_min(0) // chunk)[:, None]
        width = int((last[:, 0] - first).max()) + 1
        recent = torch.minimum(first[:, None] + torch.arange(width), last)[:, None].expand(-1, heads, -1)
        pages = torch.cat((cover.opened.clamp_min(0).cpu(), recent), -1).numpy()
        head = np.broadcast_to(np.arange(heads)[None, :, None], pages.shape)
        return self._gather(head.reshape(-1), pages.reshape(-1), (len(pages), heads, pages.shape[2] * chunk))

    def prefix(self, row: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H, stop, D) of the first tokens."""
        keys, values = self._span(0, -(-stop // self.levels.chunk))
        return keys[:, :, :stop], values[:, :, :stop]

    def crop(self, remove: Sequence[int]) -> None:
        """Forgets the last tokens; only those that are pinned can be written again."""
        super().crop(remove)
        first = -(-self.lengths[0] // self.levels.chunk)
        self.pool.forget(self.layer, first)

    def select(self, rows: Tensor, shared: int = 0) -> None:
        """Keeps its one row.

        Raises:
            ValueError: other rows are asked for.
        """
        if rows.tolist() != [0]:
            raise ValueError("a digest is read by one row at a time; beams and batches need a cache in memory")

    def _span(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        heads = self.pool.shape.heads
        head, chunk = np.meshgrid(np.arange(heads), np.arange(first, last), indexing="ij")
        return self._gather(head.reshape(-1), chunk.reshape(-1), (1, heads, (last - first) * self.levels.chunk))

    def _gather(
        self,
        heads: Numbers,
        chunks: Numbers,
        shape: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor]:
        """Pages of KV heads (n,) and chunks (n,) as keys and values (*shape, D)."""
        pool = self.pool
        dim, count, room = pool.shape.dim, len(heads), pool.room
        if count <= room:
            slots = pool.slots_of(self.layer, heads, chunks)
            return pool.keys.index_select(0, slots).view(*shape, dim), pool.values.index_select(0, slots).view(
                *shape, dim
            )
        keys = pool.keys.new_empty(count, self.levels.chunk, dim)
        values = torch.empty_like(keys)
        for first in range(0, count, max(room, 1)):
            part = slice(first, first + room)
            slots = pool.slots_of(self.layer, heads[part], chunks[part])
            keys[part] = pool.keys[slots]
            values[part] = pool.values[slots]
        return keys.view(*shape, dim), values.view(*shape, dim)

    def put(self, rows: slice, before: int, keys: Tensor, values: Tensor) -> None:
        """Writes new tokens into pinned pages."""
        pool, chunk = self.pool, self.levels.chunk
        after = before + keys.shape[2]
        if after == before:
            return
        pool.reserve(-(-after // chunk))
        touched = np.arange(before // chunk, -(-after // chunk))
        fresh = touched[pool.tables[self.layer][0, touched] < 0]
        if len(fresh):
            pool.pin(self.layer, fresh)
        token = torch.arange(before, after)
        table = torch.from_numpy(pool.tables[self.layer][:, before // chunk : -(-after // chunk)].astype(np.int64))
        slot = table[:, token // chunk - before // chunk]
        place = (slot * chunk + token % chunk).reshape(-1).to(pool.device)
        for kept, new in ((pool.keys, keys), (pool.values, values)):
            kept.view(-1, kept.shape[-1])[place] = new[0].reshape(-1, new.shape[-1])

    def complete(self, rows: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self._span(first, last)

    def _widen_tokens(self, room: int) -> None:
        """Pages need no room beforehand."""
