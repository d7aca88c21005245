"""Search kernels: the mass that voting queries give each chunk, without writing a logit to memory.

Pass 1 finds each voter's normaliser over all chunks it may judge; pass 2 sums the voters' masses chunk by chunk. A chunk's logit
is that of its best search key. Both walk the search keys in the order they are kept, by place in the chunk first, so that
the best of a chunk is an element-wise maximum over products of whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-3.3e38)


@triton.jit
def _keys(base, place, first, step_place, step_chunk, chunks, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Search keys (BLOCK_C, BLOCK_D) at one place of chunks from `first` on; zero beyond the last chunk."""
    chunk = first + tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_D)
    offset = place * step_place + chunk.to(tl.int64) * step_chunk
    mask = (chunk < chunks)[:, None]
    if D < BLOCK_D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _queries(base, m, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = (m < count)[:, None]
    if D < BLOCK_D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + m.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)


@triton.jit
def normaliser_kernel(
    q_ptr, factor_ptr, lse_ptr, search_ptr, row_ptr, visible_ptr, blocks, heads, tiles, chunks,
    step_row, step_head, step_place, step_chunk, desc,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """Pass 1. Shapes: q (N, H, M, D), factor and lse (N, H, M) in base 2, row and visible (N,); search by strides."""
    pid = tl.program_id(0)
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_ptr + block)
    visible = tl.load(visible_ptr + block).to(tl.int32)
    pair = block.to(tl.int64) * heads + head
    q = _queries(q_ptr + pair * M * D, m, M, D, BLOCK_D)
    factor = tl.load(factor_ptr + pair * M + m, mask=m < M, other=0.0)
    base = search_ptr + row * step_row + head.to(tl.int64) * step_head
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    chunk = tl.arange(0, BLOCK_C)
    for step in tl.range(0, tl.cdiv(visible, BLOCK_C) * S):
        first = step // S * BLOCK_C
        if COPY:
            k = desc.load([row.to(tl.int32), head, step % S, first, 0]).reshape(BLOCK_C, BLOCK_D)
        else:
            k = _keys(base, step % S, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
        best = tl.maximum(best, tl.dot(q, tl.trans(k), input_precision="ieee"))
        if step % S == S - 1:
            logits = tl.where((first + chunk < visible)[None, :], best * factor[:, None], -float("inf"))
            highest = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp2(peak - highest) + tl.sum(tl.exp2(logits - highest[:, None]), 1)
            peak = highest
            best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + pair * M + m, lse, mask=m < M)


@triton.jit
def mass_kernel(
    q_ptr, factor_ptr, lse_ptr, search_ptr, row_ptr, visible_ptr, live_ptr, score_ptr, blocks, heads, tiles, chunks,
    step_row, step_head, step_place, step_chunk, desc,
    M: tl.constexpr, V: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Pass 2. Shapes as in pass 1; live (N, V) uint8; score (N, H, C) float32, 0 where a chunk may not be judged."""
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_C
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    row = tl.load(row_ptr + block)
    visible = tl.load(visible_ptr + block).to(tl.int32)
    pair = block.to(tl.int64) * heads + head
    base = search_ptr + row * step_row + head.to(tl.int64) * step_head
    chunk = first + tl.arange(0, BLOCK_C)
    score = tl.zeros((BLOCK_C,), tl.float32)
    if first < visible:
        for start in tl.range(0, M, BLOCK_M, num_stages=1):
            m = start + tl.arange(0, BLOCK_M)
            q = _queries(q_ptr + pair * M * D, m, M, D, BLOCK_D)
            best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
            for place in tl.range(0, S):
                if COPY:
                    k = desc.load([row.to(tl.int32), head, place, first, 0]).reshape(BLOCK_C, BLOCK_D)
                else:
                    k = _keys(base, place, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
                best = tl.maximum(best, tl.dot(q, tl.trans(k), input_precision="ieee"))
            factor = tl.load(factor_ptr + pair * M + m, mask=m < M, other=0.0)
            lse = tl.load(lse_ptr + pair * M + m, mask=m < M, other=float("inf"))
            live = tl.load(live_ptr + block.to(tl.int64) * V + m % V, mask=m < M, other=0)
            mass = tl.exp2(best * factor[:, None] - lse[:, None])
            score += tl.sum(tl.where((live > 0)[:, None], mass, 0.0), 0)
    score = tl.where(chunk < visible, score, 0.0)
    tl.store(score_ptr + pair * chunks + chunk, score, mask=chunk < chunks)


@triton.jit
def logits_kernel(
    q_ptr, factor_ptr, logit_ptr, search_ptr, row_ptr, visible_ptr, blocks, heads, tiles, chunks,
    step_row, step_head, step_place, step_chunk,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For few voters (decode): logits in base 2 (N, H, M, C), -inf where a chunk may not be judged. M <= BLOCK_M."""
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_C
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    row = tl.load(row_ptr + block)
    visible = tl.load(visible_ptr + block).to(tl.int32)
    pair = block.to(tl.int64) * heads + head
    m = tl.arange(0, BLOCK_M)
    chunk = first + tl.arange(0, BLOCK_C)
    best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    factor = tl.load(factor_ptr + pair * M + m, mask=m < M, other=0.0)
    if first < visible:
        base = search_ptr + row * step_row + head.to(tl.int64) * step_head
        q = _queries(q_ptr + pair * M * D, m, M, D, BLOCK_D)
        for place in tl.range(0, S):
            k = _keys(base, place, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
            best = tl.maximum(best, tl.dot(q, tl.trans(k), input_precision="ieee"))
        best = tl.where((chunk < visible)[None, :], best * factor[:, None], -float("inf"))
    place_mc = (pair * M + m)[:, None] * chunks + chunk[None, :]
    tl.store(logit_ptr + place_mc, best, mask=(m < M)[:, None] & (chunk < chunks)[None, :])


@triton.jit
def split_kernel(
    opened_ptr, window_ptr, list_ptr, count_ptr, heads, width, room,
    K: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, ABOVE: tl.constexpr, LEVEL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Summaries of one level that complete a partition, sorted: one program per block and head.

    opened_ptr (N, H, K) sorted chunks, -1 at the end; window_ptr (N,); list_ptr (N, H, room), filled with -1 before;
    SIZE: tokens per chunk here; ABOVE: tokens per chunk one level up, 0 at the top.
    """
    pair = tl.program_id(0).to(tl.int64)
    window = tl.load(window_ptr + pair // heads)
    slot = tl.arange(0, BLOCK_K)
    token = tl.load(opened_ptr + pair * K + slot, mask=slot < K, other=-1) * CHUNK
    token = tl.where(token < 0, -SIZE - ABOVE - 1, token)
    opened = token // SIZE
    if ABOVE > 0:
        parent = token // ABOVE
    count = 0
    complete = (window // SIZE).to(tl.int32)
    for first in tl.range(0, complete, BLOCK):
        index = first + tl.arange(0, BLOCK)
        same = (index[None, :] == opened[:, None]) & (token >= 0)[:, None]
        split = tl.max(same.to(tl.int32), 0) > 0
        if LEVEL > 1:
            split = split | (index == 0)
        read = (index < complete) & (split == 0)
        if ABOVE > 0:
            up = (index.to(tl.int64) * SIZE // ABOVE).to(tl.int32)
            within = (up[None, :] == parent[:, None]) & (token >= 0)[:, None]
            above = (tl.max(within.to(tl.int32), 0) > 0) | (up == 0) | ((up.to(tl.int64) + 1) * ABOVE > window)
            read = read & above
        number = read.to(tl.int32)
        place = count + tl.cumsum(number, 0) - 1
        tl.store(list_ptr + pair * room + place, index.to(tl.int64), mask=read & (place < room))
        count += tl.sum(number, 0)
    tl.store(count_ptr + pair, count)
