"""The record of a call: the entries that were read, and the chunks that an answer rested on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.schedule import Blocks


@dataclass
class Record:
    """What reading cost and what it rested on. Filled while `watch` is set.

    Sums are kept where they were made, so that counting does not wait for the device.
    """

    queries: float = 0.0
    """Queries counted, summed over layers."""
    evidence_from: int | None = None
    """Queries from this position on have their attention to opened chunks recorded."""
    _entries: Tensor | None = None
    _mass: dict[int, Tensor] = field(default_factory=dict)

    @property
    def entries(self) -> list[float]:
        """Entries read per level, summed over queries and layers, averaged over KV heads."""
        return [] if self._entries is None else self._entries.tolist()

    @property
    def mass(self) -> dict[int, Tensor]:
        """Per layer: attention mass of each chunk of level 1, (H, C), of the queries from `evidence_from` on."""
        return {layer: mass.cpu() for layer, mass in self._mass.items()}

    def count(self, cover: Cover, blocks: Blocks, layer: int = 0) -> None:
        """Adds what a layer's blocks read."""
        found = cover.counted(blocks)
        self._entries = found if self._entries is None else self._entries.to(found.device) + found
        self.queries += float(blocks.length.sum())

    def shows(self, blocks: Blocks, cover: Cover) -> bool:
        """Whether the attention to opened chunks is wanted of any of these blocks."""
        from_here = self.evidence_from
        return from_here is not None and cover.opened.shape[-1] > 0 and int(blocks.start.max()) >= from_here

    def add(self, layer: int, blocks: Blocks, cover: Cover, mass: Tensor | None) -> None:
        """Adds what a layer's blocks read, and the attention mass (N, H, K) of opened chunks where it `shows`."""
        self.count(cover, blocks, layer)
        if mass is not None and self.evidence_from is not None and self.shows(blocks, cover):
            answering = blocks.on(mass.device).start >= self.evidence_from
            chunks = int(blocks.stop.max()) // cover.levels.chunk
            self.attribute(layer, cover, mass * answering[:, None, None], chunks)

    def attribute(self, layer: int, cover: Cover, mass: Tensor, chunks: int) -> None:
        """Adds the mass (N, H, K) of opened chunks, all of them before chunk `chunks`."""
        heads = cover.opened.shape[1]
        kept = self._mass.get(layer, mass.new_zeros(heads, 0, dtype=torch.float32))
        if chunks > kept.shape[1]:
            kept = torch.nn.functional.pad(kept, (0, chunks - kept.shape[1]))
        for index, block_mass in zip(cover.opened, mass.float(), strict=True):  # one by one: no chunk twice at a time
            kept.scatter_add_(1, index.clamp_min(0), block_mass * (index >= 0))
        self._mass[layer] = kept
