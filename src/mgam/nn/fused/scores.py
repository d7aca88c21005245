"""Scores of a learned policy without the products of all voters and search keys in memory, and their gradients.

The score of a chunk is the logarithm of the mean exponential over the voters of a block and the search keys of the
chunk, and what its distance alone tells.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _voter(block, j, begin, asks, STEP: tl.constexpr, V: tl.constexpr):
    """Lines of voter j of blocks, and whether it is there."""
    line = (begin + block) * V + j * STEP
    return line, (line >= 0) & (line < asks)


@triton.jit
def _asked(ask_ptr, line, live, width, R: tl.constexpr):
    column = tl.arange(0, R)
    return tl.load(ask_ptr + line[:, None].to(tl.int64) * width + column[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _keys(find_ptr, chunk, s, chunks, width, S: tl.constexpr, R: tl.constexpr):
    column = tl.arange(0, R)
    line = (chunk * S + s)[:, None].to(tl.int64) * width
    return tl.load(find_ptr + line + column[None, :], mask=(chunk < chunks)[:, None], other=0.0)


@triton.jit
def _over(
    ask_ptr, find_ptr, block, chunk, begin, asks, chunks, ask_width, find_width, scale,
    V: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logarithms (BN, BC), in base 2, of sums over voters and search keys; and how many voters are there (BN,)."""
    peak = tl.full((BN, BC), -1e30, tl.float32)
    total = tl.zeros((BN, BC), tl.float32)
    count = tl.zeros((BN,), tl.float32)
    for j in tl.range(0, V):
        line, live = _voter(block, j, begin, asks, STEP, V)
        asked = _asked(ask_ptr, line, live, ask_width, R)
        count += live.to(tl.float32)
        for s in tl.static_range(S):
            key = _keys(find_ptr, chunk, s, chunks, find_width, S, R)
            raw = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
            raw = tl.where(live[:, None], raw, -float("inf"))
            highest = tl.maximum(peak, raw)
            total = total * tl.exp2(peak - highest) + tl.exp2(raw - highest)
            peak = highest
    return peak + tl.log2(total), count


@triton.jit
def _buckets(chunk, left, right, CHUNK: tl.constexpr, FAR: tl.constexpr):
    """Rows (BN, BC) of the table of distances."""
    before = tl.minimum(chunk[None, :] - (left // CHUNK)[:, None], 0)
    after = tl.maximum(chunk[None, :] + 1 - (right // CHUNK)[:, None], 0)
    away = before + after
    far = tl.abs(away)
    found = tl.where(away > 0, FAR, 0)
    for power in tl.static_range(1, FAR):
        found += (far >= (1 << power)).to(tl.int32)
    return found


@triton.jit
def _program(
    heads, begin, BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """What one program judges: row and KV head together and apart, blocks (BN,), chunks (BC,), and the borders (BN,)
    of the blocks' windows."""
    pair = tl.program_id(2)
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    block = tl.program_id(0) * BN + tl.arange(0, BN)
    chunk = tl.program_id(1) * BC + tl.arange(0, BC)
    start = (begin + block) * BLOCK
    left = tl.maximum(start - SIDE, 0)
    return pair, row, head, block, chunk, left, start + BLOCK + (0 if CAUSAL else SIDE)


@triton.jit(do_not_specialize=["begin", "blocks", "chunks", "asks"])
def score_kernel(
    ask_ptr, find_ptr, prior_ptr, score_ptr, near_ptr, heads, begin, blocks, chunks, asks, scale,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, FAR: tl.constexpr,
    V: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN blocks x BC chunks of one row and KV head.

    ask (B, asks, H, R+1), find (B, chunks*S, H, R), prior (2*FAR, H); score (B, H, blocks, chunks) and near
    (B, H, blocks) float32, of blocks from number `begin` on. `scale` is in base 2.
    """
    pair, row, head, block, chunk, left, right = _program(heads, begin, BLOCK, SIDE, CAUSAL, BN, BC)
    ask_width = heads * (R + 1)
    asked = ask_ptr + row * asks * ask_width + head * (R + 1)
    place = pair.to(tl.int64) * blocks + block
    if tl.program_id(1) == 0:
        total = tl.zeros((BN,), tl.float32)
        count = tl.zeros((BN,), tl.float32)
        for j in tl.range(0, V):
            line, live = _voter(block, j, begin, asks, STEP, V)
            total += tl.load(asked + line.to(tl.int64) * ask_width + R, mask=live, other=0.0).to(tl.float32)
            count += live.to(tl.float32)
        tl.store(near_ptr + place, total / tl.maximum(count, 1.0), mask=block < blocks)
    reach = chunks * CHUNK
    if CAUSAL:
        reach = tl.max(left)
    if tl.program_id(1) * BC * CHUNK < reach:
        find = find_ptr + row * chunks * S * heads * R + head * R
        over, count = _over(
            asked, find, block, chunk, begin, asks, chunks, ask_width, heads * R, scale, V, STEP, S, R, BN, BC,
            PRECISION,
        )  # fmt: skip
        prior = tl.load(prior_ptr + _buckets(chunk, left, right, CHUNK, FAR) * heads + head)
        score = (over - tl.log2(tl.maximum(count, 1.0) * S)[:, None]) * 0.6931471805599453 + prior
        there = (block < blocks)[:, None] & (chunk < chunks)[None, :]
        tl.store(score_ptr + place[:, None] * chunks + chunk[None, :], score, mask=there)


@triton.jit(do_not_specialize=["begin", "blocks", "chunks", "asks"])
def score_grad_kernel(
    ask_ptr, find_ptr, grad_ptr, near_grad_ptr, dask_ptr, dfind_ptr, dprior_ptr, heads, begin, blocks, chunks, asks,
    scale, plain,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, FAR: tl.constexpr,
    V: tl.constexpr, STEP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: what BN blocks x BC chunks add to the gradients dask, dfind and dprior (float32, shapes as above).

    grad (B, H, blocks, chunks) and near_grad (B, H, blocks) float32; `plain` is the scale of products, `scale` the same
    in base 2.
    """
    pair, row, head, block, chunk, left, right = _program(heads, begin, BLOCK, SIDE, CAUSAL, BN, BC)
    ask_width = heads * (R + 1)
    ask_base = row * asks * ask_width + head * (R + 1)
    place = pair.to(tl.int64) * blocks + block
    if tl.program_id(1) == 0:
        count = tl.zeros((BN,), tl.float32)
        for j in tl.range(0, V):
            line, live = _voter(block, j, begin, asks, STEP, V)
            count += live.to(tl.float32)
        share = tl.load(near_grad_ptr + place, mask=block < blocks, other=0.0) / tl.maximum(count, 1.0)
        for j in tl.range(0, V):
            line, live = _voter(block, j, begin, asks, STEP, V)
            tl.atomic_add(
                dask_ptr + ask_base + line.to(tl.int64) * ask_width + R, share, mask=live & (block < blocks),
                sem="relaxed",
            )  # fmt: skip
    there = (block < blocks)[:, None] & (chunk < chunks)[None, :]
    grad = tl.load(grad_ptr + place[:, None] * chunks + chunk[None, :], mask=there, other=0.0)
    if tl.max(tl.abs(grad)) > 0:
        bucket = _buckets(chunk, left, right, CHUNK, FAR)
        for number in tl.range(tl.min(bucket), tl.max(bucket) + 1):
            part = tl.sum(tl.where(bucket == number, grad, 0.0))
            tl.atomic_add(dprior_ptr + number * heads + head, part, sem="relaxed")
        asked_ptr = ask_ptr + ask_base
        find_base = row * chunks * S * heads * R + head * R
        find_width = heads * R
        over, _ = _over(
            asked_ptr, find_ptr + find_base, block, chunk, begin, asks, chunks, ask_width, find_width, scale, V, STEP,
            S, R, BN, BC, PRECISION,
        )  # fmt: skip
        column = tl.arange(0, R)
        for j in tl.range(0, V):
            line, live = _voter(block, j, begin, asks, STEP, V)
            asked = _asked(asked_ptr, line, live, ask_width, R)
            dask = tl.zeros((BN, R), tl.float32)
            for s in tl.static_range(S):
                key = _keys(find_ptr + find_base, chunk, s, chunks, find_width, S, R)
                raw = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
                slope = tl.where(live[:, None], tl.exp2(raw - over) * grad * plain, 0.0)
                dask = tl.dot(slope.to(key.dtype), key, dask, input_precision=PRECISION)
            target = dask_ptr + ask_base + line[:, None].to(tl.int64) * ask_width + column[None, :]
            tl.atomic_add(target, dask, mask=live[:, None], sem="relaxed")
        for s in tl.range(0, S):
            key = _keys(find_ptr + find_base, chunk, s, chunks, find_width, S, R)
            dfind = tl.zeros((BC, R), tl.float32)
            for j in tl.range(0, V):
                line, live = _voter(block, j, begin, asks, STEP, V)
                asked = _asked(asked_ptr, line, live, ask_width, R)
                raw = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
                slope = tl.where(live[:, None], tl.exp2(raw - over) * grad * plain, 0.0)
                dfind = tl.dot(tl.trans(slope.to(asked.dtype)), asked, dfind, input_precision=PRECISION)
            target = dfind_ptr + find_base + (chunk * S + s)[:, None].to(tl.int64) * find_width + column[None, :]
            tl.atomic_add(target, dfind, mask=(chunk < chunks)[:, None], sem="relaxed")
