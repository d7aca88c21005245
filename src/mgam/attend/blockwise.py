"""The torch backend: any device, differentiable, vectorised over blocks and heads.

Memory grows with the cover, not the text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam.cover import Cover
from mgam.positions import Positions, rotate
from mgam.pyramid import Pyramid, take
from mgam.schedule import Blocks

PREFIX = 256
"""Queries that are read densely at a time."""

# Shape letters: N blocks, H KV heads, G query heads per KV head, Q queries per block, E entries before the window,
# W tokens in the window, D head dim, R rotated pairs.


def attend(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """One softmax over each block's cover. Shapes: queries (N, H*G, Q, D); returns the same shape."""
    if cover.is_dense:
        parts = [slice(*run) for run in blocks.runs()]
        return torch.cat(
            [_attend_prefix(queries[part], blocks[part], pyramid, positions, scale, softcap) for part in parts]
        )
    q_NHGQD, keys, values, bias = gather(queries, blocks, cover, pyramid, positions)
    out = _softmax(q_NHGQD, keys, values, bias, scale, softcap)
    return out.reshape(queries.shape)


def gather(
    queries: Tensor, blocks: Blocks, cover: Cover, pyramid: Pyramid, positions: Positions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (N,H,G,Q,D), keys and values (N,H,E+W,D), and the bias (N,H,Q,E+W) that holds mass and causality.

    Entries come as opened chunks, summaries level by level, then the window. Queries and keys are rotated.
    """
    count, query_heads, size, dim = queries.shape
    heads = cover.opened.shape[1]
    device = queries.device
    there = blocks.on(device)
    row = there.row
    chunk = cover.levels.chunk
    wide = torch.promote_types(queries.dtype, torch.float32)
    last = (there.stop - 1).clamp_min(0)
    ok_NHE = (cover.opened >= 0)[..., None].expand(*cover.opened.shape, chunk).flatten(2)
    # Padding is read from a token that is there (or is zeroed): its weight is 0, and 0 * NaN would be NaN.
    opened = pyramid.chunks(row, cover.opened, last)
    keys, values = [opened[0]], [opened[1]]
    bias = [torch.zeros((), dtype=wide, device=device).masked_fill(~ok_NHE, -torch.inf)]
    for level, index in enumerate(cover.summaries, start=1):
        ok = index >= 0
        for kept, states in ((keys, pyramid.keys), (values, pyramid.values)):
            kept.append(take(states[level], row, index.clamp_min(0)).masked_fill(~ok[..., None], 0))
        weight = cover.mass * math.log(cover.levels.sizes[level])
        bias.append(torch.full((), weight, dtype=wide, device=device).masked_fill(~ok, -torch.inf))
    start = cover.window_start.to(device)
    own = there.start[:, None] + torch.arange(size, device=device)
    reach = int((blocks.stop - cover.begin).max())
    window_NW = start[:, None] + torch.arange(reach, device=device)
    for gathered, near in zip((keys, values), pyramid.window(row, start, reach, last), strict=True):
        gathered.append(near if near.shape[1] == heads else near.repeat_interleave(heads // near.shape[1], 1))
    causal_NQW = window_NW[:, None] > torch.minimum(own, last[:, None])[:, :, None]
    before = torch.cat(bias, -1)
    bias_NHQE = torch.cat(
        (
            before[:, :, None].expand(count, heads, size, before.shape[-1]),
            torch.zeros((), dtype=before.dtype, device=device)
            .masked_fill(causal_NQW, -torch.inf)[:, None]
            .expand(count, heads, -1, -1),
        ),
        -1,
    )
    q_NHGQD = queries.view(count, heads, query_heads // heads, size, dim)
    if positions.kind == "granular":
        positions.check(cover.most, cover.reach(blocks))
        q_NHGQD, keys = _place(q_NHGQD, keys, cover, positions, own, start, reach)
    return q_NHGQD, torch.cat(keys, 2), torch.cat(values, 2), bias_NHQE


def _place(
    q_NHGQD: Tensor, keys: list[Tensor], cover: Cover, positions: Positions, own: Tensor, start: Tensor, reach: int
) -> tuple[Tensor, list[Tensor]]:
    """Rotates queries and keys by their ranks."""
    assert positions.rotary is not None
    cos, sin = positions.rotary.table(q_NHGQD.device, q_NHGQD.dtype, max(reach, positions.rotary.limit))
    anchor, limit = positions.anchor, cos.shape[0] - 1
    chunk = torch.arange(cover.levels.chunk, device=start.device)
    first, others = cover.ranks()
    places = [(first[..., None] + chunk).flatten(2), *others]
    turned = [
        rotate(key, cos[place], sin[place])
        for key, place in zip(keys, [(p + anchor).clamp(0, limit) for p in places], strict=False)
    ]
    base = positions.base(start)[:, None]
    window_NW = (base + torch.arange(reach, device=start.device)).clamp_max(limit)
    turned.append(rotate(keys[-1], cos[window_NW][:, None], sin[window_NW][:, None]))
    place_NQ = (base + own - start[:, None]).clamp(0, limit)
    return rotate(q_NHGQD, cos[place_NQ][:, None, None], sin[place_NQ][:, None, None]), turned


def _attend_prefix(
    queries: Tensor, blocks: Blocks, pyramid: Pyramid, positions: Positions, scale: float, softcap: float | None
) -> Tensor:
    """Dense attention of consecutive blocks of one row: nothing is gathered."""
    row, stop = int(blocks.row[0]), int(blocks.stop.max())
    count, query_heads, size, dim = queries.shape
    heads = pyramid.keys[0].shape[1]
    device = queries.device
    keys, values = pyramid.prefix(row, stop)
    own = (blocks.on(device).start[:, None] + torch.arange(size, device=device)).flatten()
    flat = queries.transpose(0, 1).reshape(1, query_heads, count * size, dim)
    if positions.kind == "granular":
        assert positions.rotary is not None
        cos, sin = positions.rotary.table(device, queries.dtype, max(stop, positions.rotary.limit))
        keys = rotate(keys, cos[:stop], sin[:stop])
        place = own.clamp_max(cos.shape[0] - 1)
        flat = rotate(flat, cos[place], sin[place])
    grouped = flat.view(1, heads, query_heads // heads, count * size, dim)
    step = max(1, PREFIX // size)  # blocks that share their keys: what lies beyond the last of them is not multiplied
    parts = []
    for first in range(0, count, step):
        end = min(stop, int(blocks.start[first : first + step].max()) + size)
        some = slice(first * size, (first + step) * size)
        parts.append(_causal(grouped[:, :, :, some], keys[:, :, :end], values[:, :, :end], own[some], scale, softcap))
    return torch.cat(parts, 3).reshape(query_heads, count, size, dim).transpose(0, 1)


def _causal(q_NHGQD: Tensor, keys: Tensor, values: Tensor, own: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Attention of queries at positions `own` (Q,) to keys from position 0 on."""
    wide = torch.promote_types(q_NHGQD.dtype, torch.float32)
    future = torch.arange(keys.shape[2], device=own.device)[None] > own[:, None]
    bias = torch.zeros((), dtype=wide, device=own.device).masked_fill(future, -torch.inf)[None, None]
    return _softmax(q_NHGQD, keys, values, bias, scale, softcap)


def _softmax(
    q_NHGQD: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention with an additive bias; queries that may read nothing get zeros."""
    count, heads, group, size, dim = q_NHGQD.shape
    entries = keys.shape[2]
    if softcap is None:
        wide = bias.to(q_NHGQD.dtype).expand(count, heads, size, entries).reshape(count * heads, 1, size, entries)
        shape = (count * heads, group, entries, dim)
        out = F.scaled_dot_product_attention(
            q_NHGQD.reshape(count * heads, group, size, dim),
            keys.reshape(count * heads, 1, entries, dim).expand(shape),
            values.reshape(count * heads, 1, entries, dim).expand(shape),
            attn_mask=wide.expand(count * heads, group, size, entries),
            scale=scale,
        )
        return out.view(count, heads, group, size, dim)
    logits = torch.einsum("nhgqd,nhed->nhgqe", q_NHGQD, keys).to(bias.dtype) * scale
    weights = torch.softmax(softcap * torch.tanh(logits / softcap) + bias[:, :, None], -1).to(values.dtype)
    return torch.einsum("nhgqe,nhed->nhgqd", weights, values)


def watched(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attend`, over a cover that opens chunks, and `masses`; what is read is gathered once."""
    q_NHGQD, keys, values, bias = gather(queries, blocks, cover, pyramid, positions)
    out = _softmax(q_NHGQD, keys, values, bias, scale, softcap).reshape(queries.shape)
    with torch.no_grad():
        return out, _masses(q_NHGQD, keys, bias, blocks, cover, scale, softcap)


def masses(
    queries: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    positions: Positions,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention mass that each opened chunk gets (N, H, K), summed over the block's queries and the group's heads.

    For evidence and pictures: it writes out the weights, so call it for a few blocks only.
    """
    with torch.no_grad():
        q_NHGQD, keys, _, bias = gather(queries, blocks, cover, pyramid, positions)
        return _masses(q_NHGQD, keys, bias, blocks, cover, scale, softcap)


def _masses(
    q_NHGQD: Tensor, keys: Tensor, bias: Tensor, blocks: Blocks, cover: Cover, scale: float, softcap: float | None
) -> Tensor:
    logits = torch.einsum("nhgqd,nhed->nhgqe", q_NHGQD, keys).to(bias.dtype) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits + bias[:, :, None], -1).nan_to_num(0.0)
    live = torch.arange(q_NHGQD.shape[3], device=keys.device) < blocks.on(keys.device).length[:, None]
    per_entry = (weights * live[:, None, None, :, None]).sum((2, 3))
    opened = cover.opened.shape[-1] * cover.levels.chunk
    return per_entry[..., :opened].unflatten(-1, (-1, cover.levels.chunk)).sum(-1)
