"""What the battery compares with: textbook formulas in float64, written apart from the library."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.schedule import Blocks, Schedule

THETA = 10000.0

Reads = list[tuple[int, int]]
"""What a query reads: (first token, tokens) of every entry, in order of place."""


def turned(states: Tensor, places: Tensor, rotated: int) -> Tensor:
    """Rotary positions as complex numbers: the first `rotated` dimensions of states (..., P, D) at places (P,)."""
    half = rotated // 2
    frequencies = THETA ** (-2 * torch.arange(half, dtype=torch.float64) / rotated)
    angles = places.to(torch.float64)[:, None] * frequencies
    pairs = torch.complex(states[..., :half].contiguous(), states[..., half:rotated].contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag, states[..., rotated:]), -1)


def dense(queries: Tensor, keys: Tensor, values: Tensor, scale: float, rotated: int = 0) -> Tensor:
    """Causal attention of one text (B, Hq, T, D) with its mask written out, in float64."""
    queries, keys, values = (states.cpu().to(torch.float64) for states in (queries, keys, values))
    group, tokens = queries.shape[1] // keys.shape[1], keys.shape[2]
    if rotated:
        places = torch.arange(tokens)
        queries, keys = turned(queries, places, rotated), turned(keys, places, rotated)
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    logits = scale * queries @ keys.transpose(-1, -2)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.softmax(logits.masked_fill(future, -torch.inf), -1) @ values


def reads(cover: Cover, block: int, head: int, query: int) -> Reads:
    """Entries that the query at position `query` of a block reads, by the words of the glossary alone."""
    sizes = cover.levels.sizes
    entries = []
    for chunk in cover.opened[block, head].tolist():
        if chunk >= 0:
            entries += [(token, 1) for token in range(chunk * sizes[1], (chunk + 1) * sizes[1])]
    for size, index in zip(sizes[1:], cover.summaries, strict=True):
        entries += [(chunk * size, size) for chunk in index[block, head].tolist() if chunk >= 0]
    entries += [(token, 1) for token in range(int(cover.window_start[block]), query + 1)]
    return sorted(entries)


def by_hand(
    query: Tensor, keys: Tensor, values: Tensor, entries: Reads, scale: float, mass: float, rotated: int
) -> Tensor:
    """One query (D,) over its entries of one head's keys and values (T, D). Ranks are counted from the first entry."""
    query, keys, values = (states.cpu().to(torch.float64) for states in (query, keys, values))
    key = torch.stack([keys[first : first + size].mean(0) for first, size in entries])
    value = torch.stack([values[first : first + size].mean(0) for first, size in entries])
    if rotated:
        ranks = torch.arange(len(entries))
        key, query = turned(key, ranks, rotated), turned(query[None], ranks[-1:], rotated)[0]
    logits = scale * key @ query
    bias = torch.tensor([mass * math.log(size) for _, size in entries], dtype=torch.float64)
    return torch.softmax(logits + bias, 0) @ value


def covered(entries: Iterable[tuple[int, int]], tokens: int) -> Tensor:
    """How many entries hold each token (tokens,)."""
    count = torch.zeros(tokens, dtype=torch.int64)
    for first, size in entries:
        count[first : first + size] += 1
    return count


def borders(schedule: Schedule, tokens: int, dense_until: int = 0) -> list[int]:
    """Positions at which a query block begins, found by walking from token to token."""
    found, begin, number = [], 0, 0
    for position in range(tokens):
        while schedule.spans[number].stop is not None and position >= schedule.spans[number].stop:
            begin, number = schedule.spans[number].stop, number + 1
        if (position - begin) % schedule.spans[number].block == 0 or position == dense_until:
            found.append(position)
    return found


def blocks_of(parts: Iterable[tuple[Blocks, Cover]]) -> Iterable[tuple[int, int, int, int, Cover, int]]:
    """(row, start, stop, decide, cover, number in the cover) of every block that covers were chosen for."""
    for blocks, cover in parts:
        for number in range(len(blocks)):
            start = int(blocks.start[number])
            stop = start + int(blocks.length[number])
            yield int(blocks.row[number]), start, stop, int(blocks.decide[number]), cover, number
