"""A bounded pool of pages: keys and values of chunks that are hot, over slower tiers that hold all of them.

Pages that are in no other tier yet are pinned; of the rest, those that were not read for longest make room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mgam.documents.store.layout import Shape
from mgam.documents.store.pages import decode
from mgam.documents.store.segment import Numbers
from mgam.errors import MemoryBudgetError

Fetch = Callable[[int, Numbers, Numbers, Tensor], None]
"""Fills pages (n, page_bytes) of a layer from KV heads (n,) and chunks (n,)."""

Place = Callable[[int, Numbers, Numbers, Tensor, Tensor, Tensor], None]
"""Writes pages of a layer, from KV heads (n,) and chunks (n,), into slots (n,) of a pool's keys and values at once."""

STAGED = 512
"""Pages fetched at a time."""
LEAST = 256
"""Slots beside the pinned ones: fewer would fetch the same pages again within one block."""


@dataclass
class Counts:
    """How often pages were asked for, and how many had to be fetched."""

    asked: int = 0
    fetched: int = 0


@dataclass
class Pool:
    """Slots for pages of all layers.

    Shapes: keys, values (slots, chunk, D); `tables[layer]` (H, C): the slot of a page, -1 where it is in a slower tier.
    """

    shape: Shape
    slots: int
    device: torch.device
    fetch: Fetch | None = None
    place: Place | None = None
    """Used in place of `fetch` where the slower tier can be read from the device."""
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        dtype: torch.dtype = getattr(torch, self.shape.dtype)
        size = (self.slots, self.shape.levels.chunk, self.shape.dim)
        # On a CPU memory that nothing was written to takes no room, so a generous pool costs what is read.
        self.keys = torch.empty(size, dtype=dtype, device=self.device)
        self.values = torch.empty(size, dtype=dtype, device=self.device)
        self.tables: list[Numbers] = [np.full((self.shape.heads, 0), -1, np.int32) for _ in range(self.shape.layers)]
        self._used = np.full(self.slots, -1, np.int64)  # when a slot was last read; PINNED: never give away
        self._owner = np.full((self.slots, 3), -1, np.int32)
        self._free = np.arange(self.slots - 1, -1, -1, dtype=np.int32)
        self._free_count = self.slots
        self._pinned = 0
        self._clock = 0
        rows = min(STAGED, self.slots)
        self._staged = torch.empty(
            rows, self.shape.page_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )

    def reserve(self, chunks: int) -> None:
        """Makes the tables reach `chunks`."""
        for layer, table in enumerate(self.tables):
            if table.shape[1] < chunks:
                wider = np.full((table.shape[0], chunks), -1, np.int32)
                wider[:, : table.shape[1]] = table
                self.tables[layer] = wider

    def slots_of(self, layer: int, heads: Numbers, chunks: Numbers) -> Tensor:
        """Slots (n,) of pages, fetched where they are not there. At most `room` pages at a time."""
        self._clock += 1
        table = self.tables[layer]
        found = table[heads, chunks]
        self.counts.asked += len(found)
        here = found[found >= 0]
        self._used[here] = np.where(self._used[here] == PINNED, PINNED, self._clock)
        if len(here) < len(found):
            away = found < 0
            pair = np.unique(heads[away].astype(np.int64) * table.shape[1] + chunks[away])
            self._bring(layer, pair // table.shape[1], pair % table.shape[1])
            found = table[heads, chunks]
        return torch.from_numpy(found.astype(np.int64)).to(self.device)

    @property
    def room(self) -> int:
        """Pages that can be asked for at once."""
        return self.slots - self._pinned

    def pin(self, layer: int, chunks: Numbers) -> Tensor:
        """Slots (H, n) for new pages of all KV heads, zeroed and kept until they are released."""
        heads = self.shape.heads
        self._clock += 1
        slots = self._take(heads * len(chunks))
        self.tables[layer][:, chunks] = slots.reshape(heads, -1)
        self._owner[slots, 0] = layer
        self._owner[slots, 1] = np.repeat(np.arange(heads), len(chunks))
        self._owner[slots, 2] = np.tile(chunks, heads)
        self._used[slots] = PINNED
        self._pinned += len(slots)
        index = torch.from_numpy(slots.astype(np.int64)).to(self.device)
        self.keys[index] = 0
        self.values[index] = 0
        return index.view(heads, -1)

    def release(self, layer: int, first: int, last: int) -> None:
        """Pages of chunks [first, last) are in a slower tier now and may make room."""
        slots = self.tables[layer][:, first:last].reshape(-1)
        slots = slots[slots >= 0]
        self._pinned -= int((self._used[slots] == PINNED).sum())
        self._used[slots] = self._clock

    def forget(self, layer: int, first: int) -> None:
        """Drops all pages of chunks from `first` on."""
        slots = self.tables[layer][:, first:].reshape(-1)
        slots = slots[slots >= 0]
        self._pinned -= int((self._used[slots] == PINNED).sum())
        self._used[slots] = -1
        self.tables[layer][:, first:] = -1
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def _bring(self, layer: int, heads: Numbers, chunks: Numbers) -> None:
        assert self.fetch is not None or self.place is not None, "a page is nowhere"
        slots = self._take(len(heads))
        if self.place is not None:
            self.place(layer, heads, chunks, torch.from_numpy(slots.astype(np.int64)), self.keys, self.values)
            self._enter(layer, heads, chunks, slots)
        else:
            self._stage(layer, heads, chunks, slots)
        self.counts.fetched += len(heads)

    def _stage(self, layer: int, heads: Numbers, chunks: Numbers, slots: Numbers) -> None:
        """Fetches pages by way of main memory."""
        assert self.fetch is not None
        index = torch.from_numpy(slots.astype(np.int64)).to(self.device)
        for first in range(0, len(heads), len(self._staged)):
            part = slice(first, first + len(self._staged))
            staged = self._staged[: len(heads[part])]
            try:
                self.fetch(layer, heads[part], chunks[part], staged)
            except BaseException:
                self._give_back(slots[first:])
                raise
            keys, values = decode(staged.to(self.device), self.shape)
            self.keys[index[part]] = keys
            self.values[index[part]] = values
            self._enter(layer, heads[part], chunks[part], slots[part])

    def _enter(self, layer: int, heads: Numbers, chunks: Numbers, slots: Numbers) -> None:
        """Notes what slots hold now."""
        self.tables[layer][heads, chunks] = slots
        self._owner[slots] = np.stack((np.full(len(slots), layer), heads, chunks), 1)
        self._used[slots] = self._clock

    def _give_back(self, slots: Numbers) -> None:
        self._used[slots] = -1
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def _take(self, count: int) -> Numbers:
        """Slots to write to: free ones, then those that were not read for longest."""
        if count > self._free_count:
            self._evict(max(count - self._free_count, min(LEAST, self.slots // 8)), count - self._free_count)
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count].copy()

    def _evict(self, wished: int, needed: int) -> None:
        ready = np.flatnonzero((self._used >= 0) & (self._used < self._clock))
        if len(ready) < needed:
            raise MemoryBudgetError(
                f"the memory bound leaves room for {self.slots:,} pages of keys and values; {needed - len(ready):,} "
                "more are needed at once; give more with --memory (memory= in Python)"
            )
        wished = min(wished, len(ready))
        oldest = ready[np.argpartition(self._used[ready], wished - 1)[:wished]]
        owner = self._owner[oldest]
        for layer in np.unique(owner[:, 0]).tolist():
            mine = owner[owner[:, 0] == layer]
            self.tables[layer][mine[:, 1], mine[:, 2]] = -1
        self._used[oldest] = -1
        self._free[self._free_count : self._free_count + len(oldest)] = oldest
        self._free_count += len(oldest)


PINNED = np.iinfo(np.int64).max
"""The time of a slot that must not be given away."""
