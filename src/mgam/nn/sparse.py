"""Softmax over parts of a text, without a matrix of all pairs: by blocks of queries, by lists, over summaries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mgam.merge import Part

# Shape letters: B rows, T tokens, L queries, H query heads, K KV heads, G = H/K, N blocks of b queries, M entries, D.

See = Callable[[Tensor, Tensor], Tensor]
"""Positions of queries and of keys, broadcast -> whether the one reads the other."""

ELEMENTS = 1 << 24
"""Elements of one gathered tensor at a time."""
GATHERED = {"cuda": 1 << 29}
"""The same where kernels are fused, and only what was gathered takes memory."""


def window_of(convention: str, size: int) -> int:
    """Our window (keys that a query reads, its own included, on one side) from that of other code.

    `keys`: the same (i-W+1 ... i). `before`: keys i-W ... i. `both`: the whole width of a bidirectional window, of
    which half lies on either side.

    Raises:
        ValueError: for another convention.
    """
    known = {"keys": size, "before": size + 1, "both": size // 2 + 1}
    if convention not in known:
        raise ValueError(f"convention={convention!r} is unknown; choose one of {', '.join(known)}")
    return known[convention]


def softmax(logits: Tensor, seen: Tensor, values: Tensor) -> Part:
    """Softmax of logits (..., Q, M) where `seen`, over values (..., M, D); zeros and -inf where nothing is seen."""
    masked = logits.masked_fill(~seen, -torch.inf)
    any_seen = seen.any(-1, keepdim=True).expand(*logits.shape[:-1], 1)
    weights = torch.softmax(torch.where(any_seen, masked, torch.zeros_like(masked)), -1)
    out = (weights * any_seen) @ values
    lse = torch.logsumexp(torch.where(any_seen, masked, torch.zeros_like(masked)), -1)
    return Part(out, lse.masked_fill(~any_seen[..., 0], -torch.inf))


def over_entries(q: Tensor, k: Tensor, v: Tensor, count: Tensor, scale: float) -> Part:
    """Each query over the first `count` (L,) of the same entries: q (B, H, L, D), k and v (B, K, M, D)."""
    grouped, number = q.unflatten(1, (k.shape[1], -1)), torch.arange(k.shape[2], device=k.device)
    step = slices(q, k.shape[2])
    parts = [
        softmax(
            scale * grouped[:, :, :, low : low + step] @ k[:, :, None].transpose(-1, -2),
            number < count[low : low + step, None],
            v[:, :, None],
        )
        for low in range(0, max(1, q.shape[2]), step)
    ]
    out, lse = (torch.cat([getattr(part, name) for part in parts], 3).flatten(1, 2) for name in ("out", "lse"))
    return Part(out, lse)


def over_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Each query over all entries, by a fused kernel: q (B, H, L, D), k and v (B, K, M, D)."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def slices(q: Tensor, entries: int) -> int:
    """Queries of q (B, H, L, D) whose logits over so many entries are written out at a time."""
    return max(1, ELEMENTS // max(1, q.shape[0] * q.shape[1] * entries))


def by_blocks(q: Tensor, k: Tensor, v: Tensor, first: int, block: int, index: Tensor, see: See, scale: float) -> Part:
    """Blocks of queries that share a list of keys.

    Shapes: q (B, H, L, D) from position `first` on; k, v (B, K, T, D); index (N, M): positions that any query of a
    block may read, in any order, twice or out of range where there is nothing; a query reads those that it sees.
    """
    length, tokens, heads = q.shape[2], k.shape[2], k.shape[1]
    index = index.sort(-1).values
    again = torch.cat((torch.zeros_like(index[:, :1], dtype=torch.bool), index[:, 1:] == index[:, :-1]), 1)
    fine = (index >= 0) & (index < tokens) & ~again
    padded = torch.nn.functional.pad(q, (0, 0, 0, len(index) * block - length))
    blocks = padded.unflatten(1, (heads, -1)).unflatten(3, (len(index), block)).movedim(3, 2)
    own = first + torch.arange(len(index) * block, device=q.device).view(-1, block)
    step = max(1, ELEMENTS // max(1, k.shape[0] * heads * index.shape[1] * (k.shape[3] + block * blocks.shape[3])))
    parts = []
    for low in range(0, len(index), step):
        part = slice(low, low + step)
        place = index[part].clamp(0, tokens - 1)
        seen = see(own[part, :, None], place[:, None]) & fine[part, None]
        near_k, near_v = (states[:, :, place][:, :, :, None] for states in (k, v))
        logits = scale * blocks[:, :, part] @ near_k.transpose(-1, -2)
        parts.append(softmax(logits, seen[:, None], near_v))
    out = torch.cat([part.out for part in parts], 2).movedim(2, 3).flatten(3, 4).flatten(1, 2)
    lse = torch.cat([part.lse for part in parts], 2).movedim(2, 3).flatten(3, 4).flatten(1, 2)
    return Part(out[:, :, :length], lse[:, :, :length])


def attended_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    block: int,
    index: Tensor,
    see: See,
    scale: float,
    recompute: bool = False,
) -> Tensor:
    """What `by_blocks` puts out, by fused kernels, for queries that read something. Same shapes.

    `recompute`: gathers again in the backward pass, so that nothing gathered is kept.
    """
    length, tokens, rows, heads = q.shape[2], k.shape[2], len(k), k.shape[1]
    spare = torch.full_like(index[:, :1], -1).expand(-1, -index.shape[1] % 16)  # kernels take multiples of 16
    index = torch.cat((index, spare), 1).sort(-1).values
    fine = (index >= 0) & (index < tokens) & (F.pad(index[:, :-1], (1, 0), value=-1) != index)
    padded = F.pad(q, (0, 0, 0, len(index) * block - length)).unflatten(2, (-1, block))
    blocks = padded.movedim(2, 0).flatten(1, 2)  # (N, B*H, b, D)
    own = first + torch.arange(len(index) * block, device=q.device).view(-1, block)
    flat_k, flat_v = (states.movedim(2, 0).flatten(1) for states in (k, v))

    def some(q: Tensor, own: Tensor, place: Tensor, fine: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (see(own[..., None], place[:, None]) & fine[:, None]) | (own >= tokens)[..., None]
        mask = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)[:, None]
        shape = (*place.shape, rows, heads, -1)
        near = [part.index_select(0, place.flatten()).view(shape).permute(0, 2, 3, 1, 4) for part in (k, v)]
        group = q.shape[1] // (rows * heads)
        k, v = (part[:, :, :, None].expand(-1, -1, -1, group, -1, -1).flatten(1, 3) for part in near)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    step = max(1, GATHERED.get(q.device.type, ELEMENTS) // (2 * index.shape[1] * flat_k.shape[1]))
    outs = []
    for low in range(0, len(index), step):
        part = slice(low, low + step)
        given = (blocks[part], own[part], index[part].clamp(0, tokens - 1), fine[part], flat_k, flat_v)
        if recompute and torch.is_grad_enabled():
            outs.append(checkpoint(some, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(some(*given))
    return torch.cat(outs).unflatten(1, (rows, -1)).movedim(0, 2).flatten(2, 3)[..., :length, :].contiguous()


def by_lists(q: Tensor, k: Tensor, v: Tensor, first: int, index: Tensor, scale: float) -> Part:
    """Each query over its own list of keys, of which those in its future are left out.

    Shapes: q (B, H, L, D); k, v (B, K, T, D); index (B, K or H, L, M), -1 where there is nothing.
    """
    rows, heads, length, dim = q.shape
    choosers, wide = index.shape[1], k.shape[1]
    own = first + torch.arange(length, device=q.device)
    step = max(1, ELEMENTS // max(1, rows * choosers * index.shape[3] * dim))
    row = torch.arange(rows, device=q.device)[:, None, None, None]
    head = (torch.arange(choosers, device=q.device) // (choosers // wide))[None, :, None, None]
    outs, sums = [], []
    for low in range(0, length, step):
        part = slice(low, low + step)
        place = index[:, :, part].clamp(0, k.shape[2] - 1)
        seen = (index[:, :, part] >= 0) & (index[:, :, part] <= own[part, None])
        asked = q[:, :, part].unflatten(1, (choosers, heads // choosers)).transpose(2, 3)
        logits = scale * asked @ k[row, head, place].transpose(-1, -2)
        found = softmax(logits, seen[:, :, :, None], v[row, head, place])
        outs.append(found.out.transpose(2, 3).flatten(1, 2))
        sums.append(found.lse.transpose(2, 3).flatten(1, 2))
    return Part(torch.cat(outs, 2), torch.cat(sums, 2))


def spans(first: int, length: int, block: int, before: int, after: int, device: torch.device) -> Tensor:
    """Positions (N, M) from `before` tokens before each block of queries to `after` tokens after it."""
    start = first + torch.arange(0, length, block, device=device)
    return start[:, None] + torch.arange(-before, block + after, device=device)
