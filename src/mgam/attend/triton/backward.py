"""Gradients of reading a cover.

Gradients of queries walk the cover as the forward pass does. Gradients of keys and values walk the inverted lists:
for each chunk
(or tile of summaries) of a row and KV head, the blocks that read it, in order. Every number is written by one program,
which sums in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import OPENED, SUMMARIES, WINDOW, entries, half_tables, products, rows, states


@triton.jit(do_not_specialize=["lines", "query_heads", "size"])
def delta_kernel(
    grad_ptr, out_ptr, delta_ptr, lines, query_heads, size, out_block, out_head, out_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Products of results and their gradients, row by row: grad (N, Hq, Q, D) contiguous, out by strides, delta
    (N, Hq, Q) float32."""
    line = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = line < lines
    block = line // size // query_heads
    offset = block * out_block + line // size % query_heads * out_head + line % size * out_row
    grad = rows(grad_ptr, line * D, live, 0, D, BLOCK_D, True).to(tl.float32)
    out = rows(out_ptr, offset, live, 0, D, BLOCK_D, True).to(tl.float32)
    tl.store(delta_ptr + line, tl.sum(grad * out, 1), mask=live)


@triton.jit
def _slopes(
    q0, q1, q2, k0, k1, k2, value, grad, lse, delta, seen, scale, bias, cap,
    D: tl.constexpr, R: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights (M, N) and gradients of the raw products (M, N), both float32; 0 where not seen."""
    raw = products(q0, q1, q2, k0, k1, k2, D, R, PRECISION) * scale
    slope = scale
    if CAP:
        bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * raw / cap))
        slope = scale * (1.0 - bent * bent)
        raw = cap * bent
    weight = tl.exp2(raw * 1.4426950408889634 + bias - lse[:, None])
    weight = tl.where(seen, weight, 0.0)
    steep = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
    return weight, tl.where(seen, weight * steep * slope, 0.0)


@triton.jit
def _row_sums(lse_ptr, delta_ptr, slot, live):
    """Log-sum-exp in base 2 and delta of rows; +inf (no weight) where a row reads nothing."""
    lse = tl.load(lse_ptr + slot, mask=live, other=float("inf")) * 1.4426950408889634
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return lse, tl.load(delta_ptr + slot, mask=live, other=0.0)


@triton.jit
def _query_tile(
    d0, d1, d2, q0, q1, q2, grad, lse, delta, own, j, end, key_ptr, value_ptr, key_step, value_step, list_ptr,
    rank_ptr, window,
    anchor, cos_ptr, sin_ptr, limit, scale, bias, cap,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    index, rank, live = entries(j, end, list_ptr, rank_ptr, window, anchor, KIND, CHUNK, BLOCK_N, R)
    if R > 0:
        rank = tl.minimum(tl.maximum(rank, 0), limit)
    k0, k1, k2 = states(key_ptr, index * key_step, live, rank, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)
    value = rows(value_ptr, index * value_step, live, 0, D, BLOCK_D, True)
    seen = live[None, :]
    if KIND == WINDOW:
        seen = seen & (index[None, :] <= own[:, None])
    _, slope = _slopes(q0, q1, q2, k0, k1, k2, value, grad, lse, delta, seen, scale, bias, cap, D, R, CAP, PRECISION)
    slope = slope.to(k0.dtype)
    d0 = tl.dot(slope, k0, d0, input_precision=PRECISION)
    if R > 0:
        d1 = tl.dot(slope, k1, d1, input_precision=PRECISION)
        if 2 * R < D:
            d2 = tl.dot(slope, k2, d2, input_precision=PRECISION)
    return d0, d1, d2


@triton.jit
def query_grad_kernel(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, block_ptr, count_ptr, keys, values, key_strides, value_strides,
    lists, ranks, widths,
    cos_ptr, sin_ptr, limit, anchor, scale, cap, biases, blocks, heads, tiles, q_block, q_head, q_row,
    G: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    CAP: tl.constexpr, BARE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, one program per tile of rows. grad, dq (N, H*G, Q, D) and lse, delta (N, H*G, Q)
    contiguous."""
    pid = tl.program_id(0)
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    row = tl.load(block_ptr + block)
    start = tl.load(block_ptr + blocks + block)
    length = tl.load(block_ptr + 2 * blocks + block)
    window = tl.load(block_ptr + 3 * blocks + block)
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query = m % Q
    there = m < G * Q
    live = there & (query < length)
    own = start + tl.minimum(query, length - 1)
    pair = block.to(tl.int64) * heads + head
    slot = pair * (G * Q) + m
    base = anchor
    if BARE:
        base = tl.where(window == 0, 0, anchor)
    place = base + (own - window).to(tl.int32)
    q_offset = block.to(tl.int64) * q_block + (head * G + m // Q).to(tl.int64) * q_head + query * q_row
    q0, q1, q2 = states(q_ptr, q_offset, live, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)
    grad = rows(grad_ptr, slot * D, live, 0, D, BLOCK_D, True)
    lse, delta = _row_sums(lse_ptr, delta_ptr, slot, live)
    d0 = tl.zeros((BLOCK_M, BLOCK_R if R > 0 else BLOCK_D), tl.float32)
    d1 = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    d2 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for level in tl.static_range(TOP + 1):
        if widths[level] > 0:
            count = tl.load(count_ptr + pair * (TOP + 1) + level)
            if level == 0:
                count = count * CHUNK
            for j in tl.range(0, count, BLOCK_N):
                d0, d1, d2 = _query_tile(
                    d0, d1, d2, q0, q1, q2, grad, lse, delta, own, j, count,
                    keys[level] + row * key_strides[level][0] + head.to(tl.int64) * key_strides[level][1],
                    values[level] + row * value_strides[level][0] + head.to(tl.int64) * value_strides[level][1],
                    key_strides[level][2], value_strides[level][2],
                    lists[level] + pair * widths[level], ranks[level] + pair * widths[level], window, base,
                    cos_ptr, sin_ptr, limit, scale, biases[level], cap,
                    OPENED if level == 0 else SUMMARIES, CHUNK, D, R, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_P, CAP,
                    PRECISION,
                )  # fmt: skip
    end = (start + length - window).to(tl.int32)
    for j in tl.range(0, end, BLOCK_N):
        d0, d1, d2 = _query_tile(
            d0, d1, d2, q0, q1, q2, grad, lse, delta, own, j, end,
            keys[0] + row * key_strides[0][0] + head.to(tl.int64) * key_strides[0][1],
            values[0] + row * value_strides[0][0] + head.to(tl.int64) * value_strides[0][1],
            key_strides[0][2], value_strides[0][2], lists[0], ranks[0], window, base, cos_ptr, sin_ptr, limit,
            scale, 0.0, cap,
            WINDOW, CHUNK, D, R, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_P, CAP, PRECISION,
        )  # fmt: skip
    _store_parts(dq_ptr, slot * D, there, d0, d1, d2, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P)


@triton.jit
def _turned_back(d0, d1, cos, sin):
    """Gradients before a rotation, from those after it."""
    return d0 * cos + d1 * sin, d1 * cos - d0 * sin


@triton.jit
def _store_columns(base, offset, live, states, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(
        base + offset[:, None] + (FIRST + column)[None, :],
        states.to(base.dtype.element_ty),
        mask=live[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit
def _store_parts(
    base, offset, live, d0, d1, d2, rank, cos_ptr, sin_ptr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Stores gradients given in parts, turned back by `rank`."""
    if R == 0:
        _store_columns(base, offset, live, d0, 0, D, BLOCK_D)
    else:
        cos, sin = half_tables(cos_ptr, sin_ptr, rank, R, BLOCK_R)
        first, second = _turned_back(d0, d1, cos, sin)
        _store_columns(base, offset, live, first, 0, R, BLOCK_R)
        _store_columns(base, offset, live, second, R, R, BLOCK_R)
        if 2 * R < D:
            _store_columns(base, offset, live, d2, 2 * R, D - 2 * R, BLOCK_P)


@triton.jit(
    do_not_specialize=["none", "blocks", "heads", "rows", "reach"], do_not_specialize_on_alignment=["block_ptr"]
)
def bucket_kernel(
    block_ptr, lists, rank_ptr, bucket_ptr, token_rank_ptr, widths, units, none, blocks, heads, rows, reach,
    CHUNK: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: which unit each place in the lists of one block and head reads.

    Places stand level by level (N, H, width): first opened chunks with `reach` chunks of the window after them, then
    summaries. bucket_ptr gets, for each, the number of its unit among those of all levels, row and KV head by row and
    KV head, or `none`: units are chunks on level 0, and TILE summaries above it, which count at the first place alone.
    token_rank_ptr (N, H, widths[0] + reach): ranks of the first level's places, from rank_ptr for opened chunks.
    """
    pair = tl.program_id(0).to(tl.int64)
    block = pair // heads
    line = tl.load(block_ptr + block) * heads + pair % heads
    start = tl.load(block_ptr + blocks + block)
    length = tl.load(block_ptr + 2 * blocks + block)
    window = tl.load(block_ptr + 3 * blocks + block)
    last = (start + length - 1) // CHUNK
    width = widths[0] + reach
    for begin in tl.range(0, width, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        opened = slot < widths[0]
        near = window // CHUNK + slot - widths[0]
        unit = tl.load(lists[0] + pair * widths[0] + slot, mask=opened, other=-1)
        unit = tl.where(opened, unit, tl.where((near <= last) & (length > 0), near, -1))
        own = tl.where(unit < 0, none, line * units[0] + unit)
        tl.store(bucket_ptr + pair * width + slot, own.to(tl.int32), mask=slot < width)
        if RANKS:
            rank = tl.load(rank_ptr + pair * widths[0] + slot, mask=opened, other=0)
            rank = tl.where(opened, rank, near * CHUNK - window)
            tl.store(token_rank_ptr + pair * width + slot, rank, mask=slot < width)
    lines = (blocks * heads).to(tl.int64)
    places = lines * width
    first = rows.to(tl.int64) * heads * units[0]
    for level in tl.static_range(1, TOP + 1):
        for begin in tl.range(0, widths[level], BLOCK):
            slot = begin + tl.arange(0, BLOCK)
            there = slot < widths[level]
            place = pair * widths[level] + slot
            index = tl.load(lists[level] + place, mask=there, other=-1)
            before = tl.load(lists[level] + place - 1, mask=there & (slot > 0), other=-1)
            again = (before >= 0) & (before // TILE == index // TILE)
            own = tl.where((index < 0) | again, none, first + line * units[level] + index // TILE)
            tl.store(bucket_ptr + places + place, own.to(tl.int32), mask=there)
        places += lines * widths[level]
        first += rows.to(tl.int64) * heads * units[level]


@triton.jit
def readers_of(
    begin_ptr, end_ptr, heads, pairs, units, first_unit,
    UNIT: tl.constexpr, SUBS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What one program sums gradients of, and for whom: its part of the readers; row and KV head together and apart;
    the first of its readers and the one after the last; its entries (BLOCK_N,), inside of their unit and in all."""
    pid = tl.program_id(0)
    sub = pid % SUBS
    part = pid // SUBS % SPLITS
    # Low units first: they are read by the most blocks.
    row_head = pid // (SUBS * SPLITS) % pairs
    unit = first_unit + pid // (SUBS * SPLITS) // pairs
    row = (row_head // heads).to(tl.int64)
    head = row_head % heads
    bucket = row_head.to(tl.int64) * units + unit
    first = tl.load(begin_ptr + bucket)
    readers = tl.load(end_ptr + bucket) - first
    begin = first + readers * part // SPLITS
    end = first + readers * (part + 1) // SPLITS
    inside = sub * BLOCK_N + tl.arange(0, BLOCK_N)
    index = unit.to(tl.int64) * UNIT + inside
    return part, row_head, row, head, begin, end, inside, index


@triton.jit(
    do_not_specialize=["units", "first_unit", "count", "kept", "origin", "width", "shift"],
    do_not_specialize_on_alignment=["block_ptr", "begin_ptr", "end_ptr", "order_ptr"],
)
def entry_grad_kernel(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, key_ptr, value_ptr, dk_ptr, dv_ptr, block_ptr, begin_ptr, end_ptr, order_ptr,
    list_ptr, rank_ptr, cos_ptr, sin_ptr, limit, anchor, scale, cap, bias, blocks, heads, pairs, units, first_unit,
    count, kept, origin, width, shift, key_row, key_head, key_step, value_row, value_head, value_step, q_block, q_head,
    q_row,
    G: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr, OPENED_WIDTH: tl.constexpr, UNIT: tl.constexpr,
    SUBS: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, CAP: tl.constexpr, BARE: tl.constexpr, RELATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one level, one program per (unit, row and KV head, part of its readers, part of
    the unit).

    A unit is UNIT neighbours: a chunk of tokens (KIND OPENED) or a tile of summaries (KIND SUMMARIES). order_ptr[p],
    less `shift`, names a place (block, head, slot) in a list (N, H, width) that reads the unit, for p in [begin, end)
    of the unit. Slots of an opened list from OPENED_WIDTH on are window chunks. rank_ptr, of the list's shape, gives
    the rank of each slot's first entry. dk and dv (SPLITS, pairs, kept, D) hold entries from `origin` on, of the
    `count` that each of `pairs` rows and heads has, zeros where nobody reads them; the readers of a unit are divided
    among SPLITS programs, whose results are summed afterwards.
    RELATIVE, for tokens: keys are turned by their place in the chunk alone, and queries by their distance
    to its first token, so that keys are turned once, and gradients turned back once.
    """
    part, row_head, row, head, begin, end, inside, index = readers_of(
        begin_ptr, end_ptr, heads, pairs, units, first_unit, UNIT, SUBS, SPLITS, BLOCK_N
    )
    live = (inside < UNIT) & (index < count)
    if begin < end:
        key_offset = row * key_row + head.to(tl.int64) * key_head + index * key_step
        value_offset = row * value_row + head.to(tl.int64) * value_head + index * value_step
        value = rows(value_ptr, value_offset, live, 0, D, BLOCK_D, True)
        d0 = tl.zeros((BLOCK_N, BLOCK_R if R > 0 else BLOCK_D), tl.float32)
        d1 = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        d2 = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if RELATIVE:
            k0, k1, k2 = states(
                key_ptr, key_offset, live, inside, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True
            )
        for p in tl.range(begin, end):
            spot = tl.load(order_ptr + p) - shift
            slot = spot % width
            block = spot // width // heads
            start = tl.load(block_ptr + blocks + block)
            length = tl.load(block_ptr + 2 * blocks + block)
            window = tl.load(block_ptr + 3 * blocks + block)
            base = anchor
            if BARE:
                base = tl.where(window == 0, 0, anchor)
            there = live
            rank = inside
            if KIND == OPENED:
                if RELATIVE:
                    base = -tl.load(rank_ptr + spot).to(tl.int32)
                elif R > 0:
                    rank = base + tl.load(rank_ptr + spot).to(tl.int32) + inside
                there = live & ((slot < OPENED_WIDTH) | (index >= window))
            else:
                near = tl.arange(0, BLOCK_N)
                held = tl.load(list_ptr + spot + near, mask=slot + near < width, other=-1)
                same = held[:, None] == index[None, :]
                there = live & (tl.max(same.to(tl.int32), 0) > 0)
                if R > 0:
                    placed = tl.load(rank_ptr + spot + near, mask=slot + near < width, other=0).to(tl.int32)
                    rank = base + tl.sum(tl.where(same, placed[:, None], 0), 0)
            if not RELATIVE:
                if R > 0:
                    rank = tl.minimum(tl.maximum(rank, 0), limit)
                k0, k1, k2 = states(
                    key_ptr, key_offset, live, rank, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True
                )
            pair = block * heads + head
            for first in tl.range(0, G * Q, BLOCK_M):
                m = first + tl.arange(0, BLOCK_M)
                query = m % Q
                asks = (m < G * Q) & (query < length)
                own = start + query
                place = base + (own - window).to(tl.int32)
                if R > 0:
                    place = tl.minimum(tl.maximum(place, 0), limit)
                line = pair * (G * Q) + m
                q_offset = block * q_block + (head * G + m // Q).to(tl.int64) * q_head + query * q_row
                q0, q1, q2 = states(
                    q_ptr, q_offset, asks, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True
                )
                grad = rows(grad_ptr, line * D, asks, 0, D, BLOCK_D, True)
                lse, delta = _row_sums(lse_ptr, delta_ptr, line, asks)
                seen = there[None, :] & asks[:, None]
                if KIND == OPENED:
                    seen = seen & (index[None, :] <= own[:, None])
                weight, slope = _slopes(
                    q0, q1, q2, k0, k1, k2, value, grad, lse, delta, seen, scale, bias, cap, D, R, CAP, PRECISION
                )
                dv = tl.dot(tl.trans(weight.to(grad.dtype)), grad, dv, input_precision=PRECISION)
                slope_t = tl.trans(slope.to(q0.dtype))
                if R == 0:
                    d0 = tl.dot(slope_t, q0, d0, input_precision=PRECISION)
                elif RELATIVE:
                    d0 = tl.dot(slope_t, q0, d0, input_precision=PRECISION)
                    d1 = tl.dot(slope_t, q1, d1, input_precision=PRECISION)
                    if 2 * R < D:
                        d2 = tl.dot(slope_t, q2, d2, input_precision=PRECISION)
                else:
                    cos, sin = half_tables(cos_ptr, sin_ptr, rank, R, BLOCK_R)
                    back0, back1 = _turned_back(
                        tl.dot(slope_t, q0, input_precision=PRECISION),
                        tl.dot(slope_t, q1, input_precision=PRECISION),
                        cos,
                        sin,
                    )
                    d0 += back0
                    d1 += back1
                    if 2 * R < D:
                        d2 = tl.dot(slope_t, q2, d2, input_precision=PRECISION)
        offset = ((part * pairs + row_head).to(tl.int64) * kept + index - origin) * D
        _store_columns(dv_ptr, offset, live, dv, 0, D, BLOCK_D)
        if R == 0:
            _store_columns(dk_ptr, offset, live, d0, 0, D, BLOCK_D)
        elif RELATIVE:
            _store_parts(dk_ptr, offset, live, d0, d1, d2, inside, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P)
        else:
            _store_columns(dk_ptr, offset, live, d0, 0, R, BLOCK_R)
            _store_columns(dk_ptr, offset, live, d1, R, R, BLOCK_R)
            if 2 * R < D:
                _store_columns(dk_ptr, offset, live, d2, 2 * R, D - 2 * R, BLOCK_P)
    else:
        offset = ((part * pairs + row_head).to(tl.int64) * kept + index - origin) * D
        none = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        _store_columns(dv_ptr, offset, live, none, 0, D, BLOCK_D)
        _store_columns(dk_ptr, offset, live, none, 0, D, BLOCK_D)
