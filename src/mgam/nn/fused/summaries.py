"""Means of keys and values of regions, one level from the level below."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "first", "room", "pairs"])
def mean_kernel(
    key_ptr, key_row, key_head, key_step, value_ptr, value_row, value_head, value_step, mean_ptr, heads, count, first,
    room, pairs, RATIO: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: one region of RATIO neighbours of one row and KV head.

    keys and values (B, H, count, D) by strides, zeros after the last; mean_ptr (2, B, H, room, D), keys first, of which
    region 0 is line `first`.
    """
    region = tl.program_id(0)
    pair = tl.program_id(1)
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    inside = (region * RATIO + tl.arange(0, RATIO)).to(tl.int64)
    column = tl.arange(0, D)
    there = (inside < count)[:, None]
    base = key_ptr + row * key_row + head * key_head
    key = tl.load(base + inside[:, None] * key_step + column[None, :], mask=there, other=0.0)
    base = value_ptr + row * value_row + head * value_head
    value = tl.load(base + inside[:, None] * value_step + column[None, :], mask=there, other=0.0)
    line = (pair.to(tl.int64) * room + first + region) * D
    kind = mean_ptr.dtype.element_ty
    tl.store(mean_ptr + line + column, (tl.sum(key.to(tl.float32), 0) / RATIO).to(kind))
    line += pairs.to(tl.int64) * room * D
    tl.store(mean_ptr + line + column, (tl.sum(value.to(tl.float32), 0) / RATIO).to(kind))


@triton.jit(do_not_specialize=["tokens", "room", "pairs"])
def spread_mean_kernel(
    sum_ptr, mean_ptr, dk_ptr, dk_row, dk_head, dk_step, dv_ptr, dv_row, dv_head, dv_step, heads, tokens, room, pairs,
    firsts, SIZES: tl.constexpr, LEVELS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: gradients of BLOCK tokens of one row and KV head, their own and their share of their summaries'.

    sum_ptr (2, B, H, tokens, D) and mean_ptr (2, B, H, room, D) float32, keys first; dk and dv by strides.
    """
    pair = tl.program_id(1)
    row = (pair // heads).to(tl.int64)
    head = pair % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, D)
    there = (token < tokens)[:, None]
    for which in tl.static_range(2):
        own = pair.to(tl.int64) + which * pairs
        grad = tl.load(sum_ptr + (own * tokens + token)[:, None] * D + column[None, :], mask=there, other=0.0)
        for level in tl.static_range(LEVELS):
            line = own * room + firsts[level] + token // SIZES[level]
            share = tl.load(mean_ptr + line[:, None] * D + column[None, :], mask=there, other=0.0)
            grad += share / SIZES[level]
        if which == 0:
            place = row * dk_row + head * dk_head + token[:, None].to(tl.int64) * dk_step + column[None, :]
            tl.store(dk_ptr + place, grad.to(dk_ptr.dtype.element_ty), mask=there)
        else:
            place = row * dv_row + head * dv_head + token[:, None].to(tl.int64) * dv_step + column[None, :]
            tl.store(dv_ptr + place, grad.to(dv_ptr.dtype.element_ty), mask=there)
