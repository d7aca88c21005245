"""How much of a block's attention each opened chunk gets: what evidence and pictures rest on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import Turn, block, precision
from mgam.attend.triton.tiles import OPENED, capped, entries, products, states


def masses(
    queries: Tensor,
    lists: Lists,
    keys: Tensor,
    lse: Tensor,
    scale: float,
    *,
    turn: Turn,
    softcap: float | None = None,
) -> Tensor:
    """Attention mass (N, H, K) float32 of each opened chunk, summed over a block's queries and a group's heads.

    Shapes: queries (N, H*G, Q, D), keys (B, H, n, D) of tokens, lse (N, H*G, Q) as `mgam.attend.triton.forward.read`
    gives it for the same lists, which must hold summaries or opened chunks.
    """
    count, query_heads, size, dim = queries.shape
    heads, width = keys.shape[1], lists.index[0].shape[-1]
    found = torch.empty(count, heads, width, dtype=torch.float32, device=queries.device)
    if not found.numel():
        return found
    rows = query_heads // heads * size
    mass_kernel[(count * heads, width)](
        queries, lse, found, lists.blocks, lists.counts, keys, keys.stride()[:3], lists.index[0], lists.ranks[0], width,
        turn.cos, turn.sin, turn.cos.shape[0] - 1, turn.anchor, scale, softcap or 1.0, count, heads,
        *queries.stride()[:3], G=query_heads // heads, Q=size, CHUNK=lists.levels.chunk, TOP=lists.levels.top, D=dim,
        R=turn.pairs, BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=block(min(lists.levels.chunk, 64)), BLOCK_D=block(dim),
        BLOCK_R=block(turn.pairs), BLOCK_P=block(dim - 2 * turn.pairs), CAP=softcap is not None,
        PRECISION=precision(queries.dtype), num_warps=4,
    )  # fmt: skip
    return found


@triton.jit(
    do_not_specialize=["limit", "anchor", "blocks", "heads", "width"],
    do_not_specialize_on_alignment=["block_ptr", "count_ptr"],
)
def mass_kernel(
    q_ptr, lse_ptr, mass_ptr, block_ptr, count_ptr, key_ptr, key_strides, list_ptr, rank_ptr, width, cos_ptr, sin_ptr,
    limit, anchor, scale, cap, blocks, heads, q_block, q_head, q_row,
    G: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one opened chunk of one block and KV head; 0 for padding of the list."""
    pair = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    block = pair // heads
    head = pair % heads
    mass = 0.0
    if slot < tl.load(count_ptr + pair * (TOP + 1)):
        row = tl.load(block_ptr + block)
        start = tl.load(block_ptr + blocks + block)
        length = tl.load(block_ptr + 2 * blocks + block)
        window = tl.load(block_ptr + 3 * blocks + block)
        base = key_ptr + row * key_strides[0] + head * key_strides[1]
        factor = 1.0 if CAP else scale * 1.4426950408889634
        for first in tl.range(0, G * Q, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            query = m % Q
            live = (m < G * Q) & (query < length)
            own = start + tl.minimum(query, length - 1)
            offset = block * q_block + (head * G + m // Q) * q_head + query * q_row
            place = anchor + (own - window).to(tl.int32)
            q0, q1, q2 = states(q_ptr, offset, live, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)
            lse = tl.load(lse_ptr + pair * (G * Q) + m, mask=live, other=0.0) * 1.4426950408889634
            for j in tl.range(slot * CHUNK, (slot + 1) * CHUNK, BLOCK_N):
                index, rank, there = entries(
                    j, (slot + 1) * CHUNK, list_ptr + pair * width, rank_ptr + pair * width, window, anchor, OPENED,
                    CHUNK, BLOCK_N, R,
                )  # fmt: skip
                rank = tl.minimum(tl.maximum(rank, 0), limit)
                k0, k1, k2 = states(
                    base, index * key_strides[2], there, rank, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True
                )
                raw = capped(products(q0, q1, q2, k0, k1, k2, D, R, PRECISION), scale, cap, CAP)
                weight = tl.where(live[:, None] & there[None, :], tl.exp2(raw * factor - lse[:, None]), 0.0)
                mass += tl.sum(tl.sum(weight, 1), 0)
    tl.store(mass_ptr + pair * width + slot, mass)
