"""Gradients of keys and values in whole tiles: queries and what comes back to them arrive by the copy engine.

Where positions are granular, queries are turned once, by their true positions, and an entry to where each of its
readers sees it. Its gradient follows: the sum so far is turned from where the last reader saw the entry to where the
next one does, and back in the end, so that it takes no more room than without turns. To a reader a chunk's tokens stand
as far apart as they are, so a chunk that is turned by its true positions once is moved as a whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.backward import readers_of
from mgam.attend.triton.tiles import OPENED, angle, placed, rows


@triton.jit(do_not_specialize=["blocks", "query_heads"])
def turn_queries_kernel(
    q_ptr, turned_ptr, block_ptr, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, blocks, query_heads, q_block, q_head,
    q_row, Q: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one block and head, by strides, turned by their true positions into turned_ptr
    (N, Hq, Q, 2 R)."""
    pid = tl.program_id(0)
    first = pid % (Q // BLOCK_M) * BLOCK_M
    line = pid // (Q // BLOCK_M)
    block = (line // query_heads).to(tl.int64)
    query = first + tl.arange(0, BLOCK_M)
    start = tl.load(block_ptr + blocks + block).to(tl.int32)
    offset = block * q_block + (line % query_heads).to(tl.int64) * q_head + query.to(tl.int64) * q_row
    q0, q1 = placed(
        q_ptr, offset, query >= 0, start + query, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, R, STEP
    )  # fmt: skip
    target = (line.to(tl.int64) * Q + query)[:, None] * (2 * R) + tl.arange(0, R)[None, :]
    tl.store(turned_ptr + target, q0)
    tl.store(turned_ptr + target + R, q1)


@triton.jit
def _moved(first, second, cos, sin):
    """Rows of two halves, turned."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(
    do_not_specialize=["blocks", "heads", "pairs", "units", "first_unit", "count", "kept", "origin", "width", "shift"],
    do_not_specialize_on_alignment=["block_ptr", "begin_ptr", "end_ptr", "order_ptr"],
)
def whole_entry_grad_kernel(
    q_desc, grad_desc, lse_ptr, delta_ptr, key_ptr, value_ptr, dk_ptr, dv_ptr, block_ptr, begin_ptr, end_ptr, order_ptr,
    list_ptr, rank_ptr, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, scale, cap, bias, blocks, heads, pairs, units,
    first_unit, count, kept, origin, width, shift, key_row, key_head, key_step, value_row, value_head, value_step,
    G: tl.constexpr, Q: tl.constexpr, KIND: tl.constexpr, OPENED_WIDTH: tl.constexpr, UNIT: tl.constexpr,
    SUBS: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `entry_grad_kernel`, for calls in whole tiles: q_desc and grad_desc (N, H*G, Q, D), queries turned by their
    true positions where R > 0; BLOCK_M divides Q, and BLOCK_N divides UNIT."""
    part, row_head, row, head, begin, end, inside, index = readers_of(
        begin_ptr, end_ptr, heads, pairs, units, first_unit, UNIT, SUBS, SPLITS, BLOCK_N
    )
    live = index < count
    HALF: tl.constexpr = D // 2
    target = ((part * pairs + row_head).to(tl.int64) * kept + index - origin) * D
    if begin < end:
        key_offset = row * key_row + head.to(tl.int64) * key_head + index * key_step
        value_offset = row * value_row + head.to(tl.int64) * value_head + index * value_step
        value = rows(value_ptr, value_offset, live, 0, D, D, True)
        dk0 = tl.zeros((BLOCK_N, HALF), tl.float32)
        dk1 = tl.zeros((BLOCK_N, HALF), tl.float32)
        dv = tl.zeros((BLOCK_N, D), tl.float32)
        half = tl.arange(0, HALF)
        here = dk_ptr + target[:, None] + half[None, :]
        seat = tl.minimum(index, count - 1).to(tl.int32)
        if R > 0 and KIND == OPENED:
            # Turned keys wait where the gradient will stand.
            true0, true1 = placed(
                key_ptr, key_offset, live, seat, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, R, STEP
            )  # fmt: skip
            tl.store(here, true0.to(dk_ptr.dtype.element_ty), mask=live[:, None])
            tl.store(here + HALF, true1.to(dk_ptr.dtype.element_ty), mask=live[:, None])
            tl.debug_barrier()
            lowest = tl.min(index - inside, 0).to(tl.int32)
            moved = lowest * 0
            last_cos = tl.full((1, HALF), 1.0, tl.float32)
            last_sin = tl.zeros((1, HALF), tl.float32)
        for p in tl.range(begin, end):
            spot = tl.load(order_ptr + p) - shift
            slot = spot % width
            pair = spot // width
            block = pair // heads
            start = tl.load(block_ptr + blocks + block).to(tl.int32)
            window = tl.load(block_ptr + 3 * blocks + block).to(tl.int32)
            there = live
            if KIND == OPENED:
                there = live & ((slot < OPENED_WIDTH) | (index >= window))
                if R > 0:
                    moved = tl.maximum(window + tl.load(rank_ptr + spot).to(tl.int32) - lowest, 0)
                    one = tl.full((1,), 0, tl.int32) + moved
                    cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, one, R, STEP, R)
                    raw0 = tl.load(here, mask=live[:, None], other=0.0).to(value.dtype)
                    raw1 = tl.load(here + HALF, mask=live[:, None], other=0.0).to(value.dtype)
                    turned0, turned1 = _moved(raw0, raw1, cos, sin)
                    # From the last reader's place: lengths are kept, and errors of the tables do not add up.
                    on, aside = _moved(cos, sin, last_cos, -last_sin)
                    length = tl.rsqrt(on * on + aside * aside)
                    dk0, dk1 = _moved(dk0, dk1, on * length, aside * length)
                    last_cos = cos
                    last_sin = sin
            else:
                near = tl.arange(0, BLOCK_N)
                held = tl.load(list_ptr + spot + near, mask=slot + near < width, other=-1)
                same = held[:, None] == index[None, :]
                there = live & (tl.max(same.to(tl.int32), 0) > 0)
                if R > 0:
                    ranks = tl.load(rank_ptr + spot + near, mask=slot + near < width, other=0).to(tl.int32)
                    place = tl.maximum(window + tl.sum(tl.where(same, ranks[:, None], 0), 0), 0)
                    place = tl.where(there, place, seat)
                    cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, tl.abs(place - seat), R, STEP, R)
                    dk0, dk1 = _moved(dk0, dk1, cos, tl.where((place < seat)[:, None], -sin, sin))
                    seat = place
                    raw0 = rows(key_ptr, key_offset, live, 0, HALF, HALF, True)
                    raw1 = rows(key_ptr, key_offset, live, HALF, HALF, HALF, True)
                    cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, place, R, STEP, R)
                    turned0, turned1 = _moved(raw0, raw1, cos, sin)
            if R > 0:
                key0 = turned0.to(value.dtype)
                key1 = turned1.to(value.dtype)
            else:
                key0 = rows(key_ptr, key_offset, live, 0, HALF, HALF, True)
                key1 = rows(key_ptr, key_offset, live, HALF, HALF, HALF, True)
            for tile in tl.range(0, G * Q, BLOCK_M):
                member = head * G + tile // Q
                first = tile % Q
                q0 = q_desc.load([block.to(tl.int32), member, first, 0]).reshape(BLOCK_M, HALF)
                q1 = q_desc.load([block.to(tl.int32), member, first, HALF]).reshape(BLOCK_M, HALF)
                grad = grad_desc.load([block.to(tl.int32), member, first, 0]).reshape(BLOCK_M, D)
                line = pair * (G * Q) + tile + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + line) * 1.4426950408889634
                delta = tl.load(delta_ptr + line)
                raw = tl.dot(key0, tl.trans(q0), input_precision=PRECISION)
                raw = tl.dot(key1, tl.trans(q1), raw, input_precision=PRECISION) * scale
                slope = scale
                if CAP:
                    bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * raw / cap))
                    slope = scale * (1.0 - bent * bent)
                    raw = cap * bent
                weight = tl.exp2(raw * 1.4426950408889634 + bias - lse[None, :])
                seen = there[:, None]
                if KIND == OPENED:
                    seen = seen & (index[:, None] <= (start + first + tl.arange(0, BLOCK_M))[None, :])
                weight = tl.where(seen, weight, 0.0)
                dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
                steep = tl.dot(value, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
                slopes = (weight * steep * slope).to(q0.dtype)
                dk0 = tl.dot(slopes, q0, dk0, input_precision=PRECISION)
                dk1 = tl.dot(slopes, q1, dk1, input_precision=PRECISION)
        if R > 0:
            if KIND == OPENED:
                seat += moved
            cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, seat, R, STEP, R)
            dk0, dk1 = _moved(dk0, dk1, cos, -sin)
        tl.store(here, dk0.to(dk_ptr.dtype.element_ty), mask=live[:, None])
        tl.store(here + HALF, dk1.to(dk_ptr.dtype.element_ty), mask=live[:, None])
        column = tl.arange(0, D)
        tl.store(dv_ptr + target[:, None] + column[None, :], dv.to(dv_ptr.dtype.element_ty), mask=live[:, None])
    else:
        column = tl.arange(0, D)
        none = tl.zeros((BLOCK_N, D), dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + target[:, None] + column[None, :], none, mask=live[:, None])
        tl.store(dv_ptr + target[:, None] + column[None, :], none, mask=live[:, None])
