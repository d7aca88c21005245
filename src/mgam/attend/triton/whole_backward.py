"""Gradients of queries in whole tiles: the walk of `whole_kernel`, with what it gathers."""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.attend.triton.tiles import angle, placed
from mgam.attend.triton.whole import near_tile, opened_tile, program, summaries_of


@triton.jit
def _slope(
    dq, q, grad, lse, delta, key, value, bias, seen, scale, cap, BIASED: tl.constexpr, MASKED: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what a tile of entries gives to the gradients (M, D) of turned queries."""
    raw = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    slope = scale
    if CAP:
        bent = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * raw / cap))
        slope = scale * (1.0 - bent * bent)
        raw = cap * bent
    raw = raw * 1.4426950408889634 - lse[:, None]
    if BIASED:
        raw = raw + bias[None, :]
    weight = tl.exp2(raw)
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    steep = tl.dot(grad, tl.trans(value), input_precision=PRECISION) - delta[:, None]
    return tl.dot((weight * steep * slope).to(key.dtype), key, dq, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=["blocks", "heads", "tiles", "few", "width", "lowest"],
    do_not_specialize_on_alignment=["block_ptr", "count_ptr"],
)
def whole_query_grad_kernel(
    q_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, block_ptr, count_ptr, list_ptr, bias_ptr, key_desc, value_desc,
    far_desc, far_value_desc, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, scale, cap, blocks, heads, tiles, few,
    width, room, lowest, q_block, q_head, q_row,
    G: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OPENED: tl.constexpr, SUMMARIES: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one block.

    grad and dq (N, H*G, Q, D), lse and delta (N, H*G, Q) contiguous; all else as `whole_kernel` takes it.
    """
    block, head, row, start, window, pair, m = program(block_ptr, blocks, heads, tiles, BLOCK_M)
    own = start + m % Q
    column = tl.arange(0, D)
    line = pair * (G * Q) + m
    q_place = block.to(tl.int64) * q_block + (head * G + m // Q).to(tl.int64) * q_head + (m % Q).to(tl.int64) * q_row
    here = dq_ptr + line[:, None] * D
    if R > 0:
        half = tl.arange(0, R)
        q0, q1 = placed(q_ptr, q_place, m >= 0, own, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, R, STEP)
        tl.store(here + half[None, :], q0)
        tl.store(here + R + half[None, :], q1)
        tl.debug_barrier()
        q = tl.load(here + column[None, :])
        tl.debug_barrier()
    else:
        q = tl.load(q_ptr + q_place[:, None] + column[None, :])
    grad = tl.load(grad_ptr + line[:, None] * D + column[None, :])
    lse = tl.load(lse_ptr + line) * 1.4426950408889634
    delta = tl.load(delta_ptr + line)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    none = tl.zeros((BLOCK_N,), tl.float32)
    if OPENED:
        count = tl.load(count_ptr + pair * (TOP + 1)) * CHUNK
        for j in tl.range(0, count, BLOCK_N):
            key, value = opened_tile(
                key_desc, value_desc, far_desc, list_ptr + pair * width, block, head, row, j, CHUNK, R, BLOCK_N, D
            )
            dq = _slope(
                dq, q, grad, lse, delta, key, value, none, own[:, None] >= 0, scale, cap, False, False, CAP, PRECISION
            )
    if SUMMARIES:
        count = summaries_of(count_ptr + pair * (TOP + 1), TOP)
        for j in tl.range(0, count, BLOCK_N):
            key = far_desc.load([block, head, few + j, 0]).reshape(BLOCK_N, D)
            value = far_value_desc.load([block, head, j, 0]).reshape(BLOCK_N, D)
            bias = tl.load(bias_ptr + pair * room + j + tl.arange(0, BLOCK_N))
            dq = _slope(
                dq, q, grad, lse, delta, key, value, bias, own[:, None] >= 0, scale, cap, True, False, CAP, PRECISION
            )
    for j in tl.range(window, start, BLOCK_N):
        key, value = near_tile(key_desc, value_desc, row, head, j, lowest, BLOCK_N, D)
        dq = _slope(
            dq, q, grad, lse, delta, key, value, none, own[:, None] >= 0, scale, cap, False, False, CAP, PRECISION
        )
    for j in tl.range(start, start + Q, BLOCK_N):
        key, value = near_tile(key_desc, value_desc, row, head, j, lowest, BLOCK_N, D)
        seen = (j + tl.arange(0, BLOCK_N))[None, :] <= own[:, None]
        dq = _slope(dq, q, grad, lse, delta, key, value, none, seen, scale, cap, False, True, CAP, PRECISION)
    if R > 0:
        d0, d1 = tl.split(tl.permute(tl.reshape(dq, (BLOCK_M, 2, R)), (0, 2, 1)))
        cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, own, R, STEP, R)
        half = tl.arange(0, R)
        tl.store(here + half[None, :], (d0 * cos + d1 * sin).to(dq_ptr.dtype.element_ty))
        tl.store(here + R + half[None, :], (d1 * cos - d0 * sin).to(dq_ptr.dtype.element_ty))
    else:
        tl.store(here + column[None, :], dq.to(dq_ptr.dtype.element_ty))
