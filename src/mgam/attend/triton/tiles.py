"""Pieces that the kernels share: loading rows, rotating them, and one step of an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

# Kinds of entries a loop runs over.
OPENED = tl.constexpr(0)
SUMMARIES = tl.constexpr(1)
WINDOW = tl.constexpr(2)

FLOOR = tl.constexpr(-3.3e38)
"""Start of a running maximum: finite, so that -inf minus it is -inf and never NaN."""

LOG2E: float = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows(base, offset, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Columns [FIRST, FIRST+WIDTH) of the rows at element offsets `offset` (M,) -> (M, BLOCK), zero where not live."""
    column = tl.arange(0, BLOCK)
    place = base + offset[:, None] + (FIRST + column)[None, :]
    if MASKED and WIDTH < BLOCK:
        return tl.load(place, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif MASKED:
        return tl.load(place, mask=live[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def half_tables(cos_ptr, sin_ptr, rank, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """cos and sin (M, BLOCK_R) of ranks (M,); zero beyond R pairs."""
    column = tl.arange(0, BLOCK_R)
    place = rank[:, None] * R + column[None, :]
    if R < BLOCK_R:
        mask = (column < R)[None, :]
        cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
    else:
        cos = tl.load(cos_ptr + place)
        sin = tl.load(sin_ptr + place)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def states(
    base, offset, live, rank, cos_ptr, sin_ptr,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of D columns in up to three parts: first and second rotated half, and the part that passes unchanged.

    With R == 0 nothing is rotated and the first part is the whole row; parts that are not there repeat the first.
    """
    if R == 0:
        whole = rows(base, offset, live, 0, D, BLOCK_D, MASKED)
        return whole, whole, whole
    else:
        first = rows(base, offset, live, 0, R, BLOCK_R, MASKED)
        second = rows(base, offset, live, R, R, BLOCK_R, MASKED)
        cos, sin = half_tables(cos_ptr, sin_ptr, rank, R, BLOCK_R)
        turned = (first * cos - second * sin).to(first.dtype)
        turned_too = (second * cos + first * sin).to(first.dtype)
        if 2 * R < D:  # noqa: SIM108  (a constant of the kernel: the other branch must not be compiled)
            passed = rows(base, offset, live, 2 * R, D - 2 * R, BLOCK_P, MASKED)
        else:
            passed = turned
        return turned, turned_too, passed


@triton.jit
def described(
    desc, row, head, first, rank, cos_ptr, sin_ptr,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same parts as `states` for BLOCK_N neighbours from `first` on, by the copy engine; columns beyond D are
    zero."""
    if R == 0:
        whole = desc.load([row, head, first, 0]).reshape(BLOCK_N, BLOCK_D)
        return whole, whole, whole
    else:
        one = desc.load([row, head, first, 0]).reshape(BLOCK_N, BLOCK_R)
        two = desc.load([row, head, first, R]).reshape(BLOCK_N, BLOCK_R)
        cos, sin = half_tables(cos_ptr, sin_ptr, rank, R, BLOCK_R)
        turned = (one * cos - two * sin).to(one.dtype)
        turned_too = (two * cos + one * sin).to(one.dtype)
        return turned, turned_too, turned


@triton.jit
def angle(
    cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, place, R: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr
):
    """cos and sin (M, BLOCK_R) of true positions (M,), composed of two turns: that of a whole number of STEP tokens, of
    length one, and that of what is left."""
    cos, sin = half_tables(cos_ptr, sin_ptr, place % STEP, R, BLOCK_R)
    far_cos, far_sin = half_tables(far_cos_ptr, far_sin_ptr, place // STEP, R, BLOCK_R)
    return cos * far_cos - sin * far_sin, sin * far_cos + cos * far_sin


@triton.jit
def placed(
    base, offset, live, place, cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr,
    R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Rows of 2 R columns, rotated by true positions (M,), in two halves."""
    first = rows(base, offset, live, 0, R, R, True)
    second = rows(base, offset, live, R, R, R, True)
    cos, sin = angle(cos_ptr, sin_ptr, far_cos_ptr, far_sin_ptr, place, R, STEP, R)
    return (first * cos - second * sin).to(first.dtype), (second * cos + first * sin).to(first.dtype)


@triton.jit
def products(a0, a1, a2, b0, b1, b2, D: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products (M, N) of rows given in parts, in float32."""
    found = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if R > 0:
        found = tl.dot(a1, tl.trans(b1), found, input_precision=PRECISION)
        if 2 * R < D:
            found = tl.dot(a2, tl.trans(b2), found, input_precision=PRECISION)
    return found


@triton.jit
def capped(raw, scale, cap, CAP: tl.constexpr):
    """Logits in base 2 over `scale`: with a cap, cap * tanh(logit / cap), already scaled."""
    if CAP:
        return cap * 1.4426950408889634 * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (raw * scale / cap))))
    else:
        return raw


@triton.jit
def entries(
    j, end, list_ptr, rank_ptr, window, anchor,
    KIND: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Entries j ... j+BLOCK_N-1 of a list: row number in their level's buffer (int64), rank, and whether j < end."""
    place = j + tl.arange(0, BLOCK_N)
    live = place < end
    rank = place
    if KIND == WINDOW:
        index = window + place
        rank = anchor + place
    elif KIND == SUMMARIES:
        index = tl.load(list_ptr + place, mask=live, other=0)
        if R > 0:
            rank = anchor + tl.load(rank_ptr + place, mask=live, other=0).to(tl.int32)
    elif CHUNK % BLOCK_N == 0:
        slot = j // CHUNK
        inside = j % CHUNK + tl.arange(0, BLOCK_N)
        index = tl.load(list_ptr + slot) * CHUNK + inside
        if R > 0:
            rank = anchor + tl.load(rank_ptr + slot).to(tl.int32) + inside
    else:
        slot = place // CHUNK
        index = tl.load(list_ptr + slot, mask=live, other=0) * CHUNK + place % CHUNK
        if R > 0:
            rank = anchor + tl.load(rank_ptr + slot, mask=live, other=0).to(tl.int32) + place % CHUNK
    return index.to(tl.int64), rank, live
