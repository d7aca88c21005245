"""Evidence: the passages that the answering queries opened and attended most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mgam.documents.sources import Source
from mgam.levels import Levels
from mgam.record import Record


@dataclass(frozen=True)
class Evidence:
    """A passage that the answer rests on."""

    file: str
    start: int
    """First character in the file's text."""
    end: int
    """First character after the passage."""
    text: str
    share: float
    """Share of the answering queries' attention to opened passages, over the layers and heads that opened them."""


class Places(Protocol):
    """The way back from tokens to texts."""

    def place(self, first: int, last: int) -> tuple[Source, int, int] | None:
        """The source and its characters that tokens [first, last) stand for; None outside every source."""
        ...


def find_evidence(record: Record, places: Places, levels: Levels, count: int) -> list[Evidence]:
    """The `count` passages with the largest shares, best first; neighbouring chunks join into one passage."""
    if not record.mass:
        return []
    chunks = max(mass.shape[1] for mass in record.mass.values())
    total = torch.zeros(chunks, dtype=torch.float64)
    for mass in record.mass.values():
        total[: mass.shape[1]] += mass.sum(0).double()
    total[0] = 0  # the sink is always open and says nothing about the answer
    whole = float(total.sum())
    if whole <= 0:
        return []
    found: list[Evidence] = []
    taken: set[int] = set()
    for chunk in total.argsort(descending=True).tolist():
        if len(found) == count or total[chunk] <= 0:
            break
        if chunk in taken:
            continue
        group = _with_neighbours(chunk, total, taken)
        taken |= set(group)
        place = places.place(group[0] * levels.chunk, (group[-1] + 1) * levels.chunk)
        if place is not None:
            source, start, end = place
            share = float(total[group[0] : group[-1] + 1].sum()) / whole
            found.append(Evidence(source.name, start, end, source.text[start:end], round(share, 4)))
    return found


def _with_neighbours(chunk: int, total: torch.Tensor, taken: set[int]) -> list[int]:
    """The chunk and the neighbours that have at least half of its mass."""
    group = [chunk]
    for step in (-1, 1):
        other = chunk + step
        if 0 < other < len(total) and other not in taken and total[other] >= total[chunk] / 2:
            group.append(other)
    return sorted(group)
