"""The oracle: attention over a cover, written to be read. Loops over blocks and heads; runs in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.merge import Part
from mgam.positions import Positions, rotate
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks


def attend(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
) -> Part:
    """One softmax over each block's cover.

    Shapes: queries (N, Hq, Q, D), rows beyond a block's length are ignored and give zeros; out (N, Hq, Q, D),
    lse (N, Hq, Q).
    """
    count, query_heads, _, _ = queries.shape
    group = query_heads // cover.opened.shape[1]
    outs, sums = [], []
    for block in range(count):
        for head in range(query_heads):
            out, lse = _one(
                queries[block, head], block, head // group, blocks, cover, pyramid, positions, scale, softcap
            )
            outs.append(out)
            sums.append(lse)
    return Part(torch.stack(outs).view_as(queries), torch.stack(sums).view(queries.shape[:3]))


def entry_list(cover: Cover, block: int, head: int) -> list[tuple[int, int, int]]:
    """(first token, level, index) of every entry before the window, in order."""
    levels = cover.levels
    entries = []
    for chunk in cover.opened[block, head].tolist():
        if chunk >= 0:
            entries += [(token, 0, token) for token in range(chunk * levels.chunk, (chunk + 1) * levels.chunk)]
    for level, index in enumerate(cover.summaries, start=1):
        entries += [(chunk * levels.sizes[level], level, chunk) for chunk in index[block, head].tolist() if chunk >= 0]
    return sorted(entries)


def _one(
    queries: Tensor,
    block: int,
    head: int,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    row, first, length = int(blocks.row[block]), int(blocks.start[block]), int(blocks.length[block])
    own_head = head // (cover.opened.shape[1] // pyramid.keys[0].shape[1])
    window = int(cover.window_start[block])
    entries = entry_list(cover, block, head)
    entries += [(token, 0, token) for token in range(window, first + length)]
    if not length:
        return torch.zeros_like(queries), queries.new_full(queries.shape[:1], -torch.inf)
    keys = torch.stack([pyramid.keys[level][row, own_head, index] for _, level, index in entries])
    values = torch.stack([pyramid.values[level][row, own_head, index] for _, level, index in entries])
    mass = torch.tensor([float(cover.levels.sizes[level]) for _, level, _ in entries])
    last = torch.tensor([start + cover.levels.sizes[level] - 1 for start, level, _ in entries], device=queries.device)
    own = torch.arange(first, first + length, device=queries.device)
    active = queries[:length]
    if positions.kind == "granular":
        assert positions.rotary is not None
        before = len(entries) - (first + length - window)
        if window:
            positions.check(before, first + length - window)
        base = positions.anchor - before if window else 0
        limit = max(positions.rotary.limit, base + len(entries))
        cos, sin = positions.rotary.table(queries.device, queries.dtype, limit)
        keys = rotate(keys, cos[base : base + len(entries)], sin[base : base + len(entries)])
        place = base + before + own - window
        active = rotate(active, cos[place], sin[place])
    logits = scale * active @ keys.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + cover.mass * torch.log(mass.to(logits))
    logits = logits.masked_fill(last[None, :] > own[:, None], -torch.inf)
    lse = torch.logsumexp(logits, -1)
    out = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[:, None]) @ values
    rest = queries.shape[0] - length
    return (
        torch.cat((out, out.new_zeros(rest, out.shape[1]))),
        torch.cat((lse, lse.new_full((rest,), -torch.inf))),
    )
