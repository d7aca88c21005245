"""Reading for one new token of few rows: the lists of a cover laid end to end and cut into tiles, about one a program.

The general kernel walks list after list, and what a program waits for adds up: here every entry of a tile finds its own
level, and all are loaded at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import FLOOR, LN2, capped, products, rows, states


@triton.jit(
    do_not_specialize=["limit", "anchor", "blocks", "heads", "key_apart", "value_apart"],
    do_not_specialize_on_alignment=["block_ptr", "count_ptr"],
)
def step_kernel(
    q_ptr, out_ptr, lse_ptr, block_ptr, count_ptr, key_ptr, value_ptr, key_apart, value_apart, key_strides,
    value_strides, lists, ranks, widths, cos_ptr, sin_ptr, limit, anchor, scale, cap, biases, blocks, heads,
    q_block, q_head,
    G: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, CAP: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the G queries of one block of one token over one part of the block's cover.

    Shapes as in `read_kernel`; out (SPLITS, N, H*G, D) float32 and lse (SPLITS, N, H*G). key_ptr and value_ptr are
    those of level 0; the buffers of level l begin key_apart[l] and value_apart[l] elements after them.
    """
    part = tl.program_id(1)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    row = tl.load(block_ptr + block)
    start = tl.load(block_ptr + blocks + block)
    length = tl.load(block_ptr + 2 * blocks + block)
    window = tl.load(block_ptr + 3 * blocks + block)
    pair = block.to(tl.int64) * heads + head
    near = (start + length - window).to(tl.int32)
    entries = near
    for level in tl.static_range(TOP + 1):
        if widths[level] > 0:
            entries += tl.load(count_ptr + pair * (TOP + 1) + level) * (CHUNK if level == 0 else 1)
    m = tl.arange(0, BLOCK_M)
    live = (m < G) & (length > 0)
    q_offset = block.to(tl.int64) * q_block + (head * G + m).to(tl.int64) * q_head
    place = anchor + (start - window).to(tl.int32) + m * 0
    q0, q1, q2 = states(q_ptr, q_offset, live, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    tiles = (entries + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tiles * part // SPLITS, tiles * (part + 1) // SPLITS, num_stages=1):
        slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there = slot < entries
        own = slot - (entries - near)
        rank = own
        bias = tl.zeros((BLOCK_N,), tl.float32)
        key_at = row * key_strides[0][0] + head * key_strides[0][1] + (window + own) * key_strides[0][2]
        value_at = row * value_strides[0][0] + head * value_strides[0][1] + (window + own) * value_strides[0][2]
        before = 0
        for level in tl.static_range(TOP + 1):
            if widths[level] > 0:
                count = tl.load(count_ptr + pair * (TOP + 1) + level) * (CHUNK if level == 0 else 1)
                own = slot - before
                here = (own >= 0) & (own < count)
                spot = pair * widths[level] + (own // CHUNK if level == 0 else own)
                index = tl.load(lists[level] + spot, mask=here, other=0)
                found = tl.load(ranks[level] + spot, mask=here, other=0).to(tl.int32)
                if level == 0:
                    index = index * CHUNK + own % CHUNK
                    found += own % CHUNK
                rank = tl.where(here, found, rank)
                bias = tl.where(here, biases[level], bias)
                at = row * key_strides[level][0] + head * key_strides[level][1] + index * key_strides[level][2]
                key_at = tl.where(here, key_apart[level] + at, key_at)
                at = row * value_strides[level][0] + head * value_strides[level][1] + index * value_strides[level][2]
                value_at = tl.where(here, value_apart[level] + at, value_at)
                before += count
        at_rank = tl.minimum(tl.maximum(anchor + rank, 0), limit)
        k0, k1, k2 = states(key_ptr, key_at, there, at_rank, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)
        value = rows(value_ptr, value_at, there, 0, D, BLOCK_D, True)
        raw = capped(products(q0, q1, q2, k0, k1, k2, D, R, PRECISION), scale, cap, CAP)
        factor = 1.0 if CAP else scale * 1.4426950408889634
        raw = tl.where(there[None, :], raw * factor + bias[None, :], -float("inf"))
        highest = tl.maximum(peak, tl.max(raw, 1))
        weight = tl.exp2(raw - highest[:, None])
        fade = tl.exp2(peak - highest)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        peak = highest
    some = live & (total > 0)
    out = tl.where(some[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, (peak + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, -float("inf"))
    line = (part * blocks + block).to(tl.int64) * (heads * G) + head * G + m
    column = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + line[:, None] * D + column[None, :], out, mask=(m < G)[:, None] & (column < D)[None, :])
    tl.store(lse_ptr + line, lse, mask=m < G)
