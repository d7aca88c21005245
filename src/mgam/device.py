"""One call of one layer on the device, without ever waiting for it: search and read over a pyramid that is built.

The engine serves every shape; these two serve the common ones at speed: the whole of a text that is read for the
first time, and one new token per row. Both give what the engine gives for the same policy and schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from mgam.attend.triton.forward import read
from mgam.attend.triton.lists import Lists, now, places
from mgam.attend.triton.tables import Turn
from mgam.cover import Cover, Known, dense_cover, window_start
from mgam.levels import Levels
from mgam.policies.asked import Asked, flat
from mgam.policies.compact import CompactKeys
from mgam.policies.scored import Scored
from mgam.policies.search_triton import cover, cover_of, most_entries, scores
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks

SCORES = 1 << 26
"""Scores kept at a time: what a search writes does not grow with the square of a text."""


def prefill(
    queries: Tensor,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    *,
    block: int = 128,
    dense_until: int = 0,
    softcap: float | None = None,
) -> Tensor:
    """Reads whole texts: queries (B, H*G, T, D) from position 0 on, over a pyramid of T tokens per row.

    Blocks of `block` queries choose by their own votes (lookahead=block); queries before `dense_until` read everything.
    Returns the same shape.
    """
    batch, _, tokens, _ = queries.shape
    levels, heads = pyramid.levels, pyramid.keys[0].shape[1]
    out = torch.empty_like(queries)
    step = max(1, SCORES // (heads * max(1, tokens // levels.chunk)))
    for row in range(batch):
        for begin, end, size, dense in _stretches(tokens, block, dense_until):
            for first in range(begin, end, step * size):
                last = min(first + step * size, end)
                taken, written = (_blocks(states, row, first, last, size) for states in (queries, out))
                _piece(taken, written, row, first, pyramid, policy, positions, scale, dense, softcap)
    return out


def _stretches(tokens: int, block: int, dense_until: int) -> Iterator[tuple[int, int, int, bool]]:
    """Begin, end, queries per block and whether all is read: no block reaches over `dense_until`."""
    dense = min(dense_until, tokens)
    after = min(-(-dense // block) * block, tokens)
    borders = (0, dense // block * block, dense, after, max(after, tokens // block * block), tokens)
    for number, (begin, end) in enumerate(pairwise(borders)):
        if begin < end:
            yield begin, end, block if (end - begin) % block == 0 else end - begin, number < 2


def _blocks(states: Tensor, row: int, first: int, last: int, size: int) -> Tensor:
    """Blocks (N, H*G, Q, D) of a row, as a view."""
    return states[row, :, first:last].unflatten(1, (-1, size)).transpose(0, 1)


def _piece(
    queries: Tensor,
    out: Tensor,
    row: int,
    begin: int,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    dense: bool,
    softcap: float | None,
) -> None:
    """Consecutive blocks of one row."""
    count, _, size, _ = queries.shape
    device = queries.device
    start = begin + torch.arange(count) * size
    blocks = Blocks(
        torch.full((count,), row), start, torch.full((count,), size), start, start, start + size, size, size
    )
    if dense:
        chosen = dense_cover(blocks, pyramid.keys[0].shape[1], pyramid.levels, device)
    else:
        chosen = choose(queries, blocks, pyramid, policy)
    lists = Lists.of(chosen, blocks, device, positions)
    turn = Turn.of(positions, lists, pyramid.tokens, device)
    read(queries, lists, pyramid.keys, pyramid.values, scale, turn=turn, softcap=softcap, out=out)


def choose(queries: Tensor, blocks: Blocks, pyramid: Pyramid, policy: Scored) -> Cover:
    """Covers of blocks of one row that all their queries (N, H*G, Q, D) vote on."""
    levels = pyramid.levels
    device = queries.device
    votes = queries[:, :, (queries.shape[2] - 1) % policy.every :: policy.every]
    live = torch.ones(votes.shape[0], votes.shape[2], dtype=torch.bool, device=device)
    start = window_start(blocks.decide, policy.window, levels)
    chunks = int(start.max()) // levels.chunk
    judged = int(blocks.decide.max()) // levels.chunk
    most = policy.budget // levels.chunk
    there = start.to(device)
    heads = pyramid.keys[0].shape[1]
    if chunks - 1 <= most:
        every = torch.zeros(len(blocks), heads, chunks, device=device)
        chosen = cover(every, there, levels, chunks, rest=policy.rest, mass=policy.mass)
        return replace(chosen, known=Known(start, most_entries(chunks, chunks, levels, policy.rest)))
    row, visible = blocks.row.to(device), (blocks.decide // levels.chunk).to(device)
    compact = policy.compact
    early = 0 if compact is None else int((blocks.decide < compact.calibrate).sum())
    found = torch.empty(len(blocks), heads, judged, device=device)
    for part, short in ((slice(0, early), False), (slice(early, len(blocks)), True)):
        if part.start < part.stop:
            asked = _asked(votes[part], live[part], row[part], visible[part], pyramid, policy, short)
            found[part] = scores(asked, judged)
    chosen = cover(found[..., :chunks], there, levels, most, rest=policy.rest, mass=policy.mass)
    return replace(chosen, known=Known(start, most_entries(chunks, most, levels, policy.rest)))


def _asked(
    votes: Tensor, live: Tensor, row: Tensor, visible: Tensor, pyramid: Pyramid, policy: Scored, short: bool
) -> Asked:
    scale = policy.scale if policy.scale is not None else votes.shape[-1] ** -0.5
    if policy.compact is not None and short:
        return CompactKeys.of(pyramid, pyramid.levels, policy.compact).asked(votes, live, row, visible, scale)
    assert pyramid.search is not None
    return flat(votes, live, pyramid.search, row, visible, scale)


def decode(
    queries: Tensor,
    lengths: Tensor,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    *,
    chunks: int,
    softcap: float | None = None,
) -> Tensor:
    """One new token per row: queries (B, H*G, 1, D); lengths (B,) on the device, the token included.

    `chunks` bounds the chunks of any row. All shapes are static and nothing waits for the device, so that the call can
    be captured in a CUDA graph and replayed while `lengths` and the pyramid's buffers change. The compact keys, where
    the policy has them, must have been made before; they are searched when every row holds the tokens that give its
    basis.
    """
    levels: Levels = pyramid.levels
    table, live = now(lengths, policy.window, levels)
    rows, _, _, start, visible = table
    short = policy.compact is not None and min(pyramid.lengths) > policy.compact.calibrate
    asked = _asked(queries, live, rows, visible, pyramid, policy, short)
    most = policy.budget // levels.chunk
    chosen = cover_of(asked, chunks, start, levels, most, rest=policy.rest, mass=policy.mass)
    index = (chosen.opened, *chosen.summaries)
    counts, ranks = chosen.placed or places(index, levels, positions.kind == "granular")
    lists = Lists(levels, table[:4], 1, index, counts, ranks, chosen.mass)
    turn = Turn.of(positions, lists, chunks * levels.chunk, queries.device, queries.dtype)
    return read(queries, lists, pyramid.keys, pyramid.values, scale, turn=turn, softcap=softcap).out
