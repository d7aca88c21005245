"""Read, forward: every block of queries reads its cover in one pass, with one online softmax.

The query heads of a KV head and the queries of a block form one tile of rows, so that an entry is loaded once for
all of them.
Entries come as opened chunks, summaries level by level, then the window. With `splits` above 1 the cover is divided
among that many programs, whose parts are merged by the last of them, or after (decode).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import (
    FLOOR,
    LN2,
    OPENED,
    SUMMARIES,
    WINDOW,
    capped,
    described,
    entries,
    products,
    rows,
    states,
)
from mgam.chain_triton import chain


@triton.jit
def _tile(
    acc, peak, total, q0, q1, q2, own, j, end, key_desc, value_desc, row, head, key_ptr, value_ptr, key_step,
    value_step, list_ptr, rank_ptr, window, anchor,
    cos_ptr, sin_ptr, limit, scale, bias, cap,
    KIND: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N entries."""
    if COPY:
        if KIND == OPENED:
            first = tl.load(list_ptr + j // CHUNK).to(tl.int32) * CHUNK + j % CHUNK
        else:
            first = (window + j).to(tl.int32)
        rank = tl.arange(0, BLOCK_N)
        if R > 0:
            if KIND == OPENED:
                rank += anchor + tl.load(rank_ptr + j // CHUNK).to(tl.int32) + j % CHUNK
            else:
                rank += anchor + j
            rank = tl.minimum(tl.maximum(rank, 0), limit)
        k0, k1, k2 = described(key_desc, row, head, first, rank, cos_ptr, sin_ptr, R, BLOCK_N, BLOCK_D, BLOCK_R)
    else:
        index, rank, live = entries(j, end, list_ptr, rank_ptr, window, anchor, KIND, CHUNK, BLOCK_N, R)
        if R > 0:
            rank = tl.minimum(tl.maximum(rank, 0), limit)
        k0, k1, k2 = states(
            key_ptr, index * key_step, live, rank, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, MASKED
        )
    raw = capped(products(q0, q1, q2, k0, k1, k2, D, R, PRECISION), scale, cap, CAP)
    if MASKED:
        seen = live[None, :]
        if KIND == WINDOW:
            seen = seen & (index[None, :] <= own[:, None])
        raw = tl.where(seen, raw, -float("inf"))
    factor = 1.0 if CAP else scale * 1.4426950408889634
    if COPY:
        value = value_desc.load([row, head, first, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        value = rows(value_ptr, index * value_step, live, 0, D, BLOCK_D, MASKED)
    highest = tl.maximum(peak, tl.max(raw, 1) * factor + bias)
    weight = tl.exp2(raw * factor + (bias - highest)[:, None])
    fade = tl.exp2(peak - highest)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit
def _run(
    acc, peak, total, q0, q1, q2, own, begin, safe, end, key_desc, value_desc, row, head, key_ptr, value_ptr,
    key_step, value_step, list_ptr, rank_ptr, window,
    anchor, cos_ptr, sin_ptr, limit, scale, bias, cap,
    KIND: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """Entries [begin, end) of one list: whole tiles up to `safe` need no mask."""
    middle = begin + (tl.maximum(safe, begin) - begin) // BLOCK_N * BLOCK_N
    # Tables of the window's tiles are left out of the pipeline where tiles have many rows, so that two programs fit a
    # multiprocessor.
    STAGES: tl.constexpr = 1 if KIND == WINDOW and R > 0 and acc.shape[0] > 32 else None
    for j in tl.range(begin, middle, BLOCK_N, num_stages=STAGES):
        acc, peak, total = _tile(
            acc, peak, total, q0, q1, q2, own, j, end, key_desc, value_desc, row, head, key_ptr, value_ptr, key_step,
            value_step, list_ptr, rank_ptr, window,
            anchor, cos_ptr, sin_ptr, limit, scale, bias, cap, KIND, False, CHUNK, D, R, BLOCK_N, BLOCK_D, BLOCK_R,
            BLOCK_P,
            CAP, PRECISION, COPY,
        )  # fmt: skip
    if not (KIND == OPENED and CHUNK % BLOCK_N == 0):
        for j in tl.range(middle, end, BLOCK_N, num_stages=1):
            acc, peak, total = _tile(
                acc, peak, total, q0, q1, q2, own, j, end, key_desc, value_desc, row, head, key_ptr, value_ptr,
                key_step, value_step, list_ptr, rank_ptr,
                window, anchor, cos_ptr, sin_ptr, limit, scale, bias, cap, KIND, True, CHUNK, D, R, BLOCK_N,
                BLOCK_D, BLOCK_R,
                BLOCK_P, CAP, PRECISION, False,
            )  # fmt: skip
    return acc, peak, total


@triton.jit
def _share(count, before, tiles, part, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """This part's stretch of a list of `count` entries, cut at multiples of STEP.

    The lists of a cover, `tiles` steps in all, are laid end to end and divided evenly; `before` of them come first.
    """
    if SPLITS == 1:
        return 0, count
    else:
        begin = tl.maximum(tiles * part // SPLITS - before, 0) * STEP
        end = tl.maximum(tiles * (part + 1) // SPLITS - before, 0) * STEP
        return tl.minimum(begin, count), tl.minimum(end, count)


@triton.jit(
    do_not_specialize=["limit", "anchor", "blocks", "heads", "tiles"],
    do_not_specialize_on_alignment=["block_ptr", "count_ptr", "place_ptr"],
)
def read_kernel(
    q_ptr, out_ptr, lse_ptr, ticket_ptr, merged_ptr, merged_lse_ptr, place_ptr, block_ptr, count_ptr, key_desc,
    value_desc, keys, values,
    key_strides, value_strides, lists, ranks, widths,
    cos_ptr, sin_ptr, limit, anchor, scale, cap, biases, blocks, heads, tiles, q_block, q_head, q_row,
    out_part, out_block, out_head, out_row,
    G: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    CAP: tl.constexpr, BARE: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, COPY: tl.constexpr,
    MERGED: tl.constexpr, ROWS: tl.constexpr, SENT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows (query heads of one group x queries of one block) over one part of the block's cover.

    Shapes: queries (N, H*G, Q, D) and out (SPLITS, N, H*G, Q, D) by strides; lse (SPLITS, N, H*G, Q) contiguous;
    block_ptr
    (4, N): row, start, length, window start; count_ptr (N, H, 1+TOP); lists[l], ranks[l] (N, H, widths[l]).
    MERGED: ticket_ptr (N, H) int32 counts the parts that are done, from 0 on, and the last one merges them, MERGED of
    them at a time, into merged_ptr (N, H*G, Q, D) and merged_lse_ptr (N, H*G, Q); ROWS: a power of two of at least G*Q.
    SENT: not into merged_ptr, but where place_ptr (1,) int64 says.
    """
    if CHAINED:
        chain()
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tile = pid % tiles
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    row = tl.load(block_ptr + block)
    start = tl.load(block_ptr + blocks + block)
    length = tl.load(block_ptr + 2 * blocks + block)
    window = tl.load(block_ptr + 3 * blocks + block)
    pair = block.to(tl.int64) * heads + head
    # Loaded before queries are, so that nothing waits for both in turn.
    counts = (tl.load(count_ptr + pair * (TOP + 1)) * CHUNK,)
    for level in tl.static_range(TOP):
        counts += (tl.load(count_ptr + pair * (TOP + 1) + level + 1),)  # type: ignore[assignment]

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = m % Q
    member = m // Q
    there = m < G * Q
    live = there & (query < length)
    own = start + tl.minimum(query, length - 1)
    q_offset = block.to(tl.int64) * q_block + (head * G + member).to(tl.int64) * q_head + query * q_row
    base = anchor
    if BARE:  # no entries before the window: where it starts at 0 this is dense attention, at true positions
        base = tl.where(window == 0, 0, anchor)
    place = base + (own - window).to(tl.int32)
    q0, q1, q2 = states(q_ptr, q_offset, live, place, cos_ptr, sin_ptr, D, R, BLOCK_D, BLOCK_R, BLOCK_P, True)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    some = length if Q == 1 else tl.max(live.to(tl.int32), 0)
    if some > 0:
        near = (start + length - window).to(tl.int32)
        tiles_all = (near + BLOCK_N - 1) // BLOCK_N
        if SPLITS > 1:
            for level in tl.static_range(TOP + 1):
                if widths[level] > 0:
                    tiles_all += (counts[level] + BLOCK_N - 1) // BLOCK_N
        before = 0
        for level in tl.static_range(TOP + 1):
            if widths[level] > 0:
                count = counts[level]
                begin, end = _share(count, before, tiles_all, part, SPLITS, BLOCK_N)
                before += (count + BLOCK_N - 1) // BLOCK_N
                acc, peak, total = _run(
                    acc, peak, total, q0, q1, q2, own, begin, end, end, key_desc, value_desc,
                    row.to(tl.int32), head,
                    keys[level] + row * key_strides[level][0] + head.to(tl.int64) * key_strides[level][1],
                    values[level] + row * value_strides[level][0] + head.to(tl.int64) * value_strides[level][1],
                    key_strides[level][2], value_strides[level][2],
                    lists[level] + pair * widths[level], ranks[level] + pair * widths[level], window, base,
                    cos_ptr, sin_ptr, limit, scale, biases[level], cap,
                    OPENED if level == 0 else SUMMARIES, CHUNK, D, R, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_P, CAP,
                    PRECISION,
                    COPY and level == 0 and CHUNK % BLOCK_N == 0,
                )  # fmt: skip
        begin, end = _share(near, before, tiles_all, part, SPLITS, BLOCK_N)
        acc, peak, total = _run(
            acc, peak, total, q0, q1, q2, own, begin, tl.minimum(end, (start + 1 - window).to(tl.int32)), end,
            key_desc, value_desc, row.to(tl.int32), head,
            keys[0] + row * key_strides[0][0] + head.to(tl.int64) * key_strides[0][1],
            values[0] + row * value_strides[0][0] + head.to(tl.int64) * value_strides[0][1],
            key_strides[0][2], value_strides[0][2], lists[0], ranks[0], window, base, cos_ptr, sin_ptr, limit,
            scale, 0.0, cap,
            WINDOW, CHUNK, D, R, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_P, CAP, PRECISION, COPY,
        )  # fmt: skip

    found = live & (total > 0)
    out = tl.where(found[:, None], acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    lse = tl.where(found, (peak + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, -float("inf"))
    slot = ((part * blocks + block).to(tl.int64) * heads + head) * (G * Q) + m
    column = tl.arange(0, BLOCK_D)
    place = part.to(tl.int64) * out_part + block.to(tl.int64) * out_block
    place = place + (head * G + member).to(tl.int64) * out_head + query.to(tl.int64) * out_row
    tl.store(
        out_ptr + place[:, None] + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (column < D)[None, :],
    )
    tl.store(lse_ptr + slot, lse, mask=there)
    if MERGED > 0:
        tl.debug_barrier()  # all threads of this program have stored their part before its ticket is drawn
        if tl.atomic_add(ticket_ptr + pair, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.debug_barrier()
            target = merged_ptr
            if SENT:
                target = tl.load(place_ptr).to(merged_ptr.dtype)
            _merge(
                out_ptr, lse_ptr, target, merged_lse_ptr, pair * (G * Q), blocks.to(tl.int64) * heads * (G * Q),
                G * Q, ROWS, D, BLOCK_D, SPLITS, MERGED,
            )  # fmt: skip


@triton.jit
def _merge(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, first, count, COUNT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merges rows first ... first+COUNT-1 of parts (SPLITS, count, D) and (SPLITS, count), which other programs wrote,
    in the order of the parts: what the first-level cache may hold of them is not asked."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    line = first + row
    peak = tl.full((ROWS,), FLOOR, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        part = start + tl.arange(0, STEP)
        there = (part < SPLITS)[:, None] & (row < COUNT)[None, :]
        place = part.to(tl.int64)[:, None] * count + line[None, :]
        lse = tl.load(part_lse_ptr + place, mask=there, other=-float("inf"), cache_modifier=".cg")
        value = tl.load(
            part_ptr + place[:, :, None] * D + column[None, None, :],
            mask=there[:, :, None] & (column < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.maximum(peak, tl.max(lse, 0))
        weight = tl.exp(lse - highest[None, :])
        fade = tl.exp(peak - highest)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * value, 0)
        peak = highest
    safe = tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + line[:, None] * D + column[None, :], (acc / safe[:, None]).to(out_ptr.dtype.element_ty),
        mask=(row < COUNT)[:, None] & (column < D)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + line, tl.where(total > 0, peak + tl.log(safe), -float("inf")), mask=row < COUNT)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, count, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merges parts (SPLITS, count, D) and (SPLITS, count) into out (count, D) and lse (count): one program a row."""
    line = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    place = part.to(tl.int64) * count + line
    lse = tl.load(part_lse_ptr + place, mask=part < SPLITS, other=-float("inf"))
    peak = tl.maximum(tl.max(lse, 0), FLOOR)
    weight = tl.exp(lse - peak)
    total = tl.sum(weight, 0)
    share = weight / tl.where(total > 0, total, 1.0)
    value = tl.load(
        part_ptr + place[:, None] * D + column[None, :],
        mask=(part < SPLITS)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    out = tl.sum(share[:, None] * value, 0)
    tl.store(out_ptr + line * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)
    tl.store(lse_ptr + line, tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), -float("inf")))
