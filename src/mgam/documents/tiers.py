"""Tiers of memory: what stays resident, how many pages are hot, and what a bound leaves for them."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from mgam import kernels
from mgam.documents.pool import LEAST, Pool
from mgam.documents.store.layout import CODES, SIZES, Shape
from mgam.documents.store.segment import Numbers
from mgam.documents.store.store import Store
from mgam.errors import MemoryBudgetError, SettingError
from mgam.integrations.memory import available_bytes

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_memory(text: str | int | None) -> int | None:
    """Bytes in words such as 2GiB, 500M or 1073741824; None stays None.

    Raises:
        SettingError: it is none.
    """
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if found is None:
        raise SettingError(f"memory {text!r} is no size; give one such as 2GiB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def slots_for(shape: Shape, tokens: int, live: int, memory: int | None, device: torch.device) -> int:
    """Slots of a pool for a text of `tokens` tokens, `live` of which are in no other tier.

    Args:
        memory: bytes for keys, values, summaries and search keys; None takes what the text needs, at most half of
            what is free.

    Raises:
        MemoryBudgetError: the bound is below the floor; says the floor.
    """
    chunk = shape.levels.chunk
    page = 2 * chunk * shape.dim * SIZES[CODES[shape.dtype]]
    per_chunk = shape.layers * shape.heads
    pinned = per_chunk * (-(-live // chunk) + 1)
    resident = int(shape.resident_bytes_per_token * (tokens + live))
    every = per_chunk * (-(-(tokens + live) // chunk) + 2)
    if memory is None:
        free = available_bytes(device)
        return every if free is None else max(min(every, (free // 2 - resident) // page), pinned + LEAST)
    floor = resident + (pinned + LEAST) * page
    if memory < floor:
        raise MemoryBudgetError(
            f"a memory bound of {_mib(memory)} is below the floor of {_mib(floor)} for {tokens:,} tokens of this "
            f"model: {_mib(resident)} for summaries and search keys, which stay in memory, and "
            f"{_mib(floor - resident)} for what is being read; give --memory {-(-floor // 2**20)}MiB or more, or a "
            "shorter text"
        )
    return min(every, (memory - resident) // page)


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


class HostPages:
    """All pages in main memory, pinned where a GPU fetches them. Every page is checked as it is loaded.

    Shapes: `layers[i]` (C, H, page_bytes) uint8.
    """

    def __init__(self, layers: list[Tensor]) -> None:
        self.layers = layers

    @classmethod
    def of(cls, store: Store, device: torch.device) -> HostPages:
        """The pages of a digest, each checked."""
        shape, pinned = store.manifest.shape, device.type == "cuda"
        chunks = store.manifest.done // shape.levels.chunk
        layers = []
        for layer in range(shape.layers):
            pages = torch.empty(chunks, shape.heads, shape.page_bytes, dtype=torch.uint8, pin_memory=pinned)
            chunk, head = np.divmod(np.arange(chunks * shape.heads), shape.heads)
            store.read_pages(layer, head, chunk, pages.view(-1, shape.page_bytes))
            layers.append(pages)
        return cls(layers)

    def serve(self, pool: Pool) -> None:
        """Gives a pool its pages: a GPU reads plain ones itself where they are pinned, others go through the CPU."""
        plain = pool.shape.bits != 8 and all(pages.is_pinned() for pages in self.layers)
        if plain and kernels.serve(pool.keys):
            pool.place = self.place
        else:
            pool.fetch = self.fetch

    def fetch(self, layer: int, heads: Numbers, chunks: Numbers, pages: Tensor) -> None:
        """Copies pages (n, page_bytes) of KV heads (n,) and chunks (n,)."""
        flat, index = self._rows(layer, heads, chunks)
        torch.index_select(flat, 0, index, out=pages)

    def place(self, layer: int, heads: Numbers, chunks: Numbers, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copies them into slots (n,) of a pool's keys and values, by a kernel that reads main memory."""
        from mgam.documents.place_triton import place_pages

        place_pages(*self._rows(layer, heads, chunks), slots, keys, values)

    def _rows(self, layer: int, heads: Numbers, chunks: Numbers) -> tuple[Tensor, Tensor]:
        kept = self.layers[layer]
        index = torch.from_numpy(np.asarray(chunks, np.int64) * kept.shape[1] + np.asarray(heads, np.int64))
        return kept.view(-1, kept.shape[-1]), index
