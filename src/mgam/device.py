"""One call of one layer on the device, without ever waiting for it: search and read over a pyramid that is built.

The engine serves every shape; these two serve the common ones at speed: the whole of a text that is read for the
first time, and one new token per row. Both give what the engine gives for the same policy and schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgam.attend.triton.forward import Turn, read
from mgam.attend.triton.lists import Lists, places
from mgam.cover import Cover, dense_cover, window_start
from mgam.levels import Levels
from mgam.policies.asked import Asked, flat
from mgam.policies.compact import CompactKeys
from mgam.policies.scored import Scored
from mgam.policies.search_triton import cover, scores
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

    Blocks of `block` queries choose by their own votes (lookahead=block). Returns the same shape.
    """
    batch, _, tokens, _ = queries.shape
    levels, heads = pyramid.levels, pyramid.keys[0].shape[1]
    out = torch.empty_like(queries)
    whole = tokens // block
    room = heads * max(1, tokens // levels.chunk)
    step = max(1, SCORES // room)
    for row in range(batch):
        for first in range(0, whole, step):
            last = min(first + step, whole)
            taken, written = (_blocks(states, row, first, last, block) for states in (queries, out))
            _piece(taken, written, row, first * block, block, pyramid, policy, positions, scale, dense_until, softcap)
        if whole * block < tokens:
            rest = slice(whole * block, tokens)
            taken, written = queries[row : row + 1, :, rest], out[row : row + 1, :, rest]
            _piece(taken, written, row, whole * block, block, pyramid, policy, positions, scale, dense_until, softcap)
    return out


def _blocks(states: Tensor, row: int, first: int, last: int, block: int) -> Tensor:
    """Blocks (N, H*G, Q, D) of a row, as a view."""
    part = states[row, :, first * block : last * block]
    return part.unflatten(1, (last - first, block)).transpose(0, 1)


def _piece(
    queries: Tensor,
    out: Tensor,
    row: int,
    begin: int,
    block: int,
    pyramid: Pyramid,
    policy: Scored,
    positions: Positions,
    scale: float,
    dense_until: int,
    softcap: float | None,
) -> None:
    """Consecutive blocks of one row: those before `dense_until` read everything."""
    count, _, size, _ = queries.shape
    device = queries.device
    dense = min(count, -(-max(0, dense_until - begin) // block))
    for part, plain in ((slice(0, dense), True), (slice(dense, count), False)):
        number = len(range(*part.indices(count)))
        if not number:
            continue
        start = begin + (part.start + torch.arange(number)) * block
        length = torch.full((number,), size)
        blocks = Blocks(torch.full((number,), row), start, length, start, start, start + size, size, size)
        chosen = choose(queries[part], blocks, pyramid, policy) if not plain else None
        if chosen is None:
            chosen = dense_cover(blocks, pyramid.keys[0].shape[1], pyramid.levels, device)
        lists = Lists.of(chosen, blocks, device, positions)
        turn = Turn.of(positions, lists, pyramid.tokens, device)
        read(queries[part], lists, pyramid.keys, pyramid.values, scale, turn=turn, softcap=softcap, out=out[part])


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
        return cover(every, there, levels, chunks, rest=policy.rest, mass=policy.mass)
    row, visible = blocks.row.to(device), (blocks.decide // levels.chunk).to(device)
    compact = policy.compact
    early = 0 if compact is None else int((blocks.decide < compact.calibrate).sum())
    found = torch.empty(len(blocks), heads, judged, device=device)
    for part, short in ((slice(0, early), False), (slice(early, len(blocks)), True)):
        if part.start < part.stop:
            asked = _asked(votes[part], live[part], row[part], visible[part], pyramid, policy, short)
            found[part] = scores(asked, judged)
    return cover(found[..., :chunks], there, levels, most, rest=policy.rest, mass=policy.mass)


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

    `chunks` bounds the chunks of any row. All shapes are static and nothing waits for the device, so that the call
    can be
    captured in a CUDA graph and replayed while `lengths` and the pyramid's buffers change. The compact keys, where
    the policy
    has them, must have been made before; they are searched when every row holds the tokens that give its basis.
    """
    levels: Levels = pyramid.levels
    rows = torch.arange(queries.shape[0], device=queries.device)
    decide = lengths - 1
    start = window_start(decide, policy.window, levels)
    visible = decide // levels.chunk
    live = torch.ones(queries.shape[0], 1, dtype=torch.bool, device=queries.device)
    short = policy.compact is not None and min(pyramid.lengths) > policy.compact.calibrate
    asked = _asked(queries, live, rows, visible, pyramid, policy, short)
    chosen = cover(
        scores(asked, chunks), start, levels, policy.budget // levels.chunk, rest=policy.rest, mass=policy.mass
    )
    index = (chosen.opened, *chosen.summaries)
    counts, ranks = places(index, levels, positions.kind == "granular")
    table = torch.stack((rows, decide, torch.ones_like(decide), start))
    lists = Lists(levels, table, 1, index, counts, ranks, chosen.mass)
    turn = Turn.of(positions, lists, chunks * levels.chunk, queries.device, queries.dtype)
    return read(queries, lists, pyramid.keys, pyramid.values, scale, turn=turn, softcap=softcap).out
