"""Attention of sliding layers: what the model does itself, for rows of any lengths; memory grows with the text only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape letters: B rows, H KV heads, G query heads per KV head, L new tokens, M keys, N blocks of S queries, W keys per
# block, D head dim.


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    held: Sequence[int],
    window: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Each query reads the last `window` tokens, itself included.

    Shapes: queries (B, H*G, L, D), keys and values (B, H, M, D) with M >= L, whose last L columns are the queries' own.
    Row b holds its last `held[b]` columns. Returns (B, H*G, L, D); columns that a row does not hold mean nothing.
    """
    rows, query_heads, columns, dim = queries.shape
    heads, count = keys.shape[1:3]
    group, device = query_heads // heads, queries.device
    size = min(columns, max(window, 16))
    blocks = -(-columns // size)
    own_NS = torch.arange(blocks * size, device=device).view(blocks, size) + count - columns
    key_NW = own_NS[:, :1] - (window - 1) + torch.arange(size + window - 1, device=device)
    first_B = count - torch.tensor(list(held), device=device)
    reads = (key_NW[:, None] <= own_NS[..., None]) & (key_NW[:, None] > own_NS[..., None] - window)
    reads = reads[None] & (key_NW >= first_B[:, None, None])[:, :, None]
    # A query of padding reads itself: a row of a softmax must not be empty.
    reads = (reads | (key_NW[:, None] == own_NS[..., None])) & (key_NW < count)[None, :, None]
    reads = reads | (own_NS >= count)[None, :, :, None]
    index = key_NW.clamp(0, count - 1)
    q = F.pad(queries, (0, 0, 0, blocks * size - columns)).view(rows, heads, group, blocks, size, dim)
    q = q.transpose(2, 3).reshape(rows * heads * blocks, group, size, dim)
    taken = [states[:, :, index].reshape(rows * heads * blocks, 1, -1, dim) for states in (keys, values)]
    k, v = (states.expand(-1, group, -1, -1) for states in taken)
    mask = reads[:, None].expand(rows, heads, blocks, size, -1).reshape(rows * heads * blocks, 1, size, -1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, group, -1, -1), scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = softcap * torch.tanh((q @ k.transpose(-1, -2)).to(wide) * scale / softcap)
        out = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).to(v.dtype) @ v
    out = out.view(rows, heads, blocks, group, size, dim).transpose(2, 3)
    return out.reshape(rows, query_heads, blocks * size, dim)[:, :, :columns]
