"""Reading in whole tiles, for prefill: what is read comes by the copy engine alone.

A kernel that gathers entries one by one spends its registers and its instructions on addresses. Here entries that are
not neighbours are gathered beforehand: summaries of all levels into one list per block and head, with the logarithm of
their mass, and, where positions are granular, opened chunks. Positions are true ones: a window's keys are turned once
for all blocks, and what lies before a window is turned to stand right before it, rank by rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import FLOOR, LN2, angle, capped, half_tables, placed


@triton.jit(do_not_specialize=["heads", "tokens", "room", "first"])
def turn_kernel(
    turned_ptr, key_ptr, key_strides, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, heads, tokens, room, first,
    R: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N tokens of one row and KV head, turned by their true positions into turned_ptr
    (B, H, room, 2 R), which holds the tokens from `first` on; zeros from token `tokens` on."""
    pair = tl.program_id(1).to(tl.int64)
    spot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = first + spot
    base = key_ptr + pair // heads * key_strides[0] + pair % heads * key_strides[1]
    k0, k1 = placed(
        base, place.to(tl.int64) * key_strides[2], place < tokens, tl.minimum(place, tokens - 1), cos_ptr, sin_ptr,
        far_cos_ptr, far_sin_ptr, R, STEP,
    )  # fmt: skip
    target = (pair * room + spot)[:, None] * (2 * R) + tl.arange(0, R)[None, :]
    tl.store(turned_ptr + target, k0)
    tl.store(turned_ptr + target + R, k1)


@triton.jit(do_not_specialize=["blocks", "heads", "tiles", "room"])
def open_kernel(
    far_ptr, block_ptr, count_ptr, key_ptr, key_strides, list_ptr, rank_ptr, width, cos_ptr, sin_ptr, far_cos_ptr,
    far_sin_ptr, blocks, heads, tiles, room,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One program: TILES times BLOCK_N tokens of opened chunks of one block and KV head, turned to stand before the
    window.

    far_ptr (N, H, room, 2 R) holds opened chunks in their order from its first line on. Neighbours stand as far apart
    wherever they stand, so that their turns are one table, which is turned as a whole for each tile.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * (TILES * BLOCK_N)
    count = tl.load(count_ptr + pair * LEVELS).to(tl.int32) * CHUNK
    if begin < count:
        block = pair // heads
        row = tl.load(block_ptr + block)
        window = tl.load(block_ptr + 3 * blocks + block)
        base = key_ptr + row * key_strides[0] + pair % heads * key_strides[1]
        near = tl.arange(0, BLOCK_N)
        column = tl.arange(0, R)[None, :]
        near_cos, near_sin = half_tables(cos_ptr, sin_ptr, near, R, R)
        for first in tl.range(begin, tl.minimum(begin + TILES * BLOCK_N, count), BLOCK_N):
            slot = pair * width + first // CHUNK
            token = tl.load(list_ptr + slot) * CHUNK + first % CHUNK + near
            place = (window + tl.load(rank_ptr + slot)).to(tl.int32) + first % CHUNK
            one = tl.full((1,), 0, tl.int32) + tl.maximum(place, 0)
            there_cos, there_sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, one, R, STEP, R)
            cos = near_cos * there_cos - near_sin * there_sin
            sin = near_sin * there_cos + near_cos * there_sin
            source = base + (token * key_strides[2])[:, None] + column
            k0 = tl.load(source)
            k1 = tl.load(source + R)
            target = far_ptr + (pair * room + first + near)[:, None] * (2 * R) + column
            tl.store(target, (k0 * cos - k1 * sin).to(k0.dtype))
            tl.store(target + R, (k1 * cos + k0 * sin).to(k0.dtype))


@triton.jit(do_not_specialize=["blocks", "heads", "tiles", "room", "first"])
def gather_kernel(
    far_ptr, value_ptr, bias_ptr, block_ptr, count_ptr, keys, values, key_strides, value_strides, lists, ranks, widths,
    biases, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, blocks, heads, tiles, room, first,
    TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N summaries of one block and KV head, of all levels one after the other.

    Keys go to far_ptr (N, H, room, D) from line `first` on, turned to stand before the window where R > 0; values to
    value_ptr (N, H, room - first, D); the logarithm of their mass, in base 2, to bias_ptr (N, H, room - first), -inf
    where there is no summary.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * BLOCK_N
    block = pair // heads
    head = pair % heads
    row = tl.load(block_ptr + block)
    window = tl.load(block_ptr + 3 * blocks + block)
    slot = begin + tl.arange(0, BLOCK_N)
    column = tl.arange(0, D)
    bias = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    value = tl.zeros((BLOCK_N, D), value_ptr.dtype.element_ty)
    half = tl.arange(0, D if R == 0 else R)
    k0 = tl.zeros((BLOCK_N, D if R == 0 else R), far_ptr.dtype.element_ty)
    k1 = k0
    total = 0
    for level in tl.static_range(1, TOP + 1):
        if widths[level] > 0:
            count = tl.load(count_ptr + pair * (TOP + 1) + level)
            own = slot - total
            live = (own >= 0) & (own < count)
            if (begin < total + count) & (begin + BLOCK_N > total):
                list_ptr = lists[level] + pair * widths[level]
                index = tl.load(list_ptr + own, mask=live, other=0)
                bias = tl.where(live, biases[level], bias)
                base = values[level] + row * value_strides[level][0] + head * value_strides[level][1]
                found = tl.load(
                    base + (index * value_strides[level][2])[:, None] + column[None, :], mask=live[:, None], other=0.0
                )
                value = tl.where(live[:, None], found, value)
                base = keys[level] + row * key_strides[level][0] + head * key_strides[level][1]
                offset = index * key_strides[level][2]
                if R == 0:
                    found = tl.load(base + offset[:, None] + half[None, :], mask=live[:, None], other=0.0)
                    k0 = tl.where(live[:, None], found, k0)
                else:
                    rank = tl.load(ranks[level] + pair * widths[level] + own, mask=live, other=0)
                    place = tl.maximum((window + rank).to(tl.int32), 0)
                    f0, f1 = placed(base, offset, live, place, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, R, STEP)
                    k0 = tl.where(live[:, None], f0, k0)
                    k1 = tl.where(live[:, None], f1, k1)
            total += count
    if begin < total:
        target = (pair * (room - first) + slot)[:, None] * D + column[None, :]
        tl.store(value_ptr + target, value)
        tl.store(bias_ptr + pair * (room - first) + slot, bias)
        target = (pair * room + first + slot)[:, None] * D + half[None, :]
        tl.store(far_ptr + target, k0)
        if R > 0:
            tl.store(far_ptr + target + R, k1)


@triton.jit
def _step(
    acc, peak, total, q, key, value, bias, seen, scale, cap, BIASED: tl.constexpr, MASKED: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    raw = capped(tl.dot(q, tl.trans(key), input_precision=PRECISION), scale, cap, CAP)
    factor = 1.0 if CAP else scale * 1.4426950408889634
    if MASKED:
        raw = tl.where(seen, raw, -float("inf"))
    if BIASED:
        raw = raw * factor + bias[None, :]
        highest = tl.maximum(peak, tl.max(raw, 1))
        weight = tl.exp2(raw - highest[:, None])
    else:
        highest = tl.maximum(peak, tl.max(raw, 1) * factor)
        weight = tl.exp2(raw * factor - highest[:, None])
    fade = tl.exp2(peak - highest)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit
def opened_tile(
    key_desc, value_desc, far_desc, list_ptr, block, head, row, j,
    CHUNK: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Keys and values (BLOCK_N, D) of what a block opened, from token j of it on; turned keys where R > 0."""
    first = tl.load(list_ptr + j // CHUNK).to(tl.int32) * CHUNK + j % CHUNK
    if R > 0:
        key = far_desc.load([block, head, j, 0]).reshape(BLOCK_N, D)
    else:
        key = key_desc.load([row, head, first, 0]).reshape(BLOCK_N, D)
    return key, value_desc.load([row, head, first, 0]).reshape(BLOCK_N, D)


@triton.jit
def summaries_of(count_ptr, TOP: tl.constexpr):
    """How many summaries a block reads, of all levels."""
    count = 0
    for level in tl.static_range(1, TOP + 1):
        count += tl.load(count_ptr + level)
    return count


@triton.jit
def near_tile(key_desc, value_desc, row, head, j, lowest, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Keys and values (BLOCK_N, D) of tokens from j on."""
    key = key_desc.load([row, head, j - lowest, 0]).reshape(BLOCK_N, D)
    return key, value_desc.load([row, head, j, 0]).reshape(BLOCK_N, D)


@triton.jit
def program(block_ptr, blocks, heads, tiles, BLOCK_M: tl.constexpr):
    """What one program of a walk in whole tiles reads for: block and KV head, row of the batch, first position of the
    block and of its window, number of the pair of block and head, and the program's rows (BLOCK_M,)."""
    pid = tl.program_id(0)
    tile = pid % tiles
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    row = tl.load(block_ptr + block).to(tl.int32)
    start = tl.load(block_ptr + blocks + block).to(tl.int32)
    window = tl.load(block_ptr + 3 * blocks + block).to(tl.int32)
    pair = block.to(tl.int64) * heads + head
    return block, head, row, start, window, pair, tile * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit(
    do_not_specialize=["blocks", "heads", "tiles", "few", "width", "lowest"],
    do_not_specialize_on_alignment=["block_ptr", "count_ptr"],
)
def whole_kernel(
    q_ptr, out_ptr, lse_ptr, block_ptr, count_ptr, list_ptr, bias_ptr, key_desc, value_desc, far_desc, far_value_desc,
    cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, scale, cap, blocks, heads, tiles, few, width, room,
    lowest, q_block, q_head, q_row, out_block, out_head, out_row,
    G: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPENED: tl.constexpr, SUMMARIES: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (query heads of one group x queries of one block) over the block's cover.

    Shapes: queries and out (N, H*G, Q, D) by strides, lse (N, H*G, Q); block_ptr (4, N); count_ptr (N, H, 1+TOP);
    list_ptr (N, H, width) opened chunks. key_desc and value_desc (B, H, n, D) hold tokens, key_desc
    those from `lowest` on; far_desc (N, H, ., D):
    `few` lines of opened keys where R > 0, then keys of summaries; far_value_desc and bias_ptr as `gather_kernel` makes
    them, `room` long.
    """
    block, head, row, start, window, pair, m = program(block_ptr, blocks, heads, tiles, BLOCK_M)
    own = start + m % Q
    column = tl.arange(0, D)
    member = (head * G + m // Q).to(tl.int64)
    q_place = block.to(tl.int64) * q_block + member * q_head + (m % Q).to(tl.int64) * q_row
    out_place = block.to(tl.int64) * out_block + member * out_head + (m % Q).to(tl.int64) * out_row
    if R > 0:
        # Turned queries take the way through memory (where the result will stand): from registers the compiler would
        # load them again for every tile of keys.
        q0, q1 = placed(q_ptr, q_place, m >= 0, own, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, R, STEP)
        half = tl.arange(0, R)
        tl.store(out_ptr + out_place[:, None] + half[None, :], q0)
        tl.store(out_ptr + out_place[:, None] + (R + half)[None, :], q1)
        tl.debug_barrier()
        q = tl.load(out_ptr + out_place[:, None] + column[None, :])
    else:
        q = tl.load(q_ptr + q_place[:, None] + column[None, :])

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    none = tl.zeros((BLOCK_N,), tl.float32)
    if OPENED:
        count = tl.load(count_ptr + pair * (TOP + 1)) * CHUNK
        for j in tl.range(0, count, BLOCK_N):
            key, value = opened_tile(
                key_desc, value_desc, far_desc, list_ptr + pair * width, block, head, row, j, CHUNK, R, BLOCK_N, D
            )
            acc, peak, total = _step(
                acc, peak, total, q, key, value, none, own[:, None] >= 0, scale, cap, False, False, CAP, PRECISION
            )
    if SUMMARIES:
        count = summaries_of(count_ptr + pair * (TOP + 1), TOP)
        for j in tl.range(0, count, BLOCK_N):
            key = far_desc.load([block, head, few + j, 0]).reshape(BLOCK_N, D)
            value = far_value_desc.load([block, head, j, 0]).reshape(BLOCK_N, D)
            bias = tl.load(bias_ptr + pair * room + j + tl.arange(0, BLOCK_N))
            acc, peak, total = _step(
                acc, peak, total, q, key, value, bias, own[:, None] >= 0, scale, cap, True, False, CAP, PRECISION
            )
    for j in tl.range(window, start, BLOCK_N):
        key, value = near_tile(key_desc, value_desc, row, head, j, lowest, BLOCK_N, D)
        acc, peak, total = _step(
            acc, peak, total, q, key, value, none, own[:, None] >= 0, scale, cap, False, False, CAP, PRECISION
        )
    for j in tl.range(start, start + Q, BLOCK_N):
        key, value = near_tile(key_desc, value_desc, row, head, j, lowest, BLOCK_N, D)
        seen = (j + tl.arange(0, BLOCK_N))[None, :] <= own[:, None]
        acc, peak, total = _step(acc, peak, total, q, key, value, none, seen, scale, cap, False, True, CAP, PRECISION)

    tl.store(out_ptr + out_place[:, None] + column[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + pair * (G * Q) + m, (peak + tl.log2(total)) * LN2)
