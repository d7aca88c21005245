"""The cover of each block out of its scores, and the way back: the gradient of a gate to the scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log_sum(value, axis: tl.constexpr):
    """Logarithm of summed exponentials along an axis; -inf where all are."""
    peak = tl.maximum(tl.max(value, axis), -1e30)
    wide = tl.expand_dims(peak, axis)
    return peak + tl.log2(tl.sum(tl.exp2((value - wide) * LOG2E), axis)) / LOG2E


@triton.jit
def _listed(list_ptr, one, number, first, done, room):
    """Writes first + number where `one` into a list from place `done` on; how long the list is then."""
    held = one.to(tl.int32)
    place = done + tl.cumsum(held, 0) - 1
    tl.store(list_ptr + place, (first + number).to(tl.int32), mask=one & (place < room))
    return done + tl.sum(held)


@triton.jit
def _coarser(whole, split, score, middle, WIDTH: tl.constexpr, RATIO: tl.constexpr):
    """The level above: regions that are whole, those read finer, that again for each of their parts; scores; numbers.

    A region is read finer where a part of it is, and where it is one of the `middle` best of the others.
    """
    here = tl.min(tl.reshape(whole, (WIDTH // RATIO, RATIO)), 1)
    apart = tl.maximum(tl.max(tl.reshape(split, (WIDTH // RATIO, RATIO)), 1), 1 - here)
    score = tl.where(apart > 0, -float("inf"), _log_sum(tl.reshape(score, (WIDTH // RATIO, RATIO)), 1))
    above = tl.arange(0, WIDTH // RATIO)
    for _ in tl.range(0, middle):
        best = tl.max(score, 0)
        at = tl.min(tl.where(score == best, above, WIDTH), 0)
        keep = above == tl.where(best > -float("inf"), at, -1)
        apart = tl.where(keep, 1, apart)
        score = tl.where(keep, -float("inf"), score)
    again = tl.reshape(tl.broadcast_to(apart[:, None], (WIDTH // RATIO, RATIO)), (WIDTH,))
    return here, apart, again, score, above


@triton.jit
def _spread(row, line, told, here, chunks, SPAN: tl.constexpr, BM: tl.constexpr):
    """Writes shares (BM,) of regions to the scores of the SPAN chunks of each."""
    inside = line[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    share = tl.broadcast_to((told / SPAN)[:, None], (BM, SPAN))
    tl.store(row + inside, share, mask=here[:, None] & (inside < chunks))


@triton.jit(do_not_specialize=["begin", "blocks", "every", "chunks", "tokens", "most", "room", "middle"])
def choose_kernel(
    score_ptr, near_ptr, fine_ptr, list_ptr, count_ptr, begin, blocks, every, chunks, tokens, most, room, middle, share,
    firsts,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr,
    RATIOS: tl.constexpr, WIDTHS: tl.constexpr, SHARED: tl.constexpr, SUMMARIES: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """One program: the cover of one block of one row and KV head.

    score (B, H, blocks, chunks) and near (B, H, blocks) of the blocks from `begin` on, of `every` in all. Writes, for
    block n: fine (B, H, every, most+2) int32, chunks that are read as tokens: those opened first, then the ends of the
    text; list (B, H, every, room) int32, lines of summaries, the levels one after the other from firsts[l] on; count
    (B, H, every, 3) int32: opened, read as tokens, summaries. RATIOS[l]: regions of level l+1 in one of level l+2;
    WIDTHS[l]: regions of level l+1, up to a power of two.
    """
    number = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    start = (begin + number) * BLOCK
    left = tl.maximum(start - SIDE, 0)
    right = start + BLOCK + (0 if CAUSAL else SIDE)
    chunk = tl.arange(0, CP)
    end = (chunk + 1) * CHUNK
    visible = end <= left
    if not CAUSAL:
        visible = visible | ((end - CHUNK >= right) & (end <= tokens))
    visible = visible & (chunk < chunks)
    score = tl.load(score_ptr + (pair * blocks + number) * chunks + chunk, mask=visible, other=-float("inf"))
    free = tl.where(chunk > 0, score, -float("inf"))
    own = pair * every + begin + number
    held = 0.0
    total = 0.0
    if SHARED:
        near = tl.load(near_ptr + pair * blocks + number)
        far = _log_sum(free, 0)
        peak = tl.maximum(near, far)
        total = peak + tl.log2(tl.exp2((near - peak) * LOG2E) + tl.exp2((far - peak) * LOG2E)) / LOG2E
        held = tl.exp2((near - total) * LOG2E)
    fine = visible & (chunk == 0)
    opened = 0
    for slot in tl.range(0, most):
        best = tl.max(free, 0)
        at = tl.min(tl.where(free == best, chunk, CP), 0)
        wanted = best > -float("inf")
        if SHARED:
            wanted = wanted & (held < share)
            held += tl.exp2((best - total) * LOG2E)
        tl.store(fine_ptr + own * (most + 2) + slot, at, mask=wanted)
        opened += wanted.to(tl.int32)
        fine = fine | (chunk == tl.where(wanted, at, -1))
        free = tl.where(chunk == at, -float("inf"), free)
    tl.store(count_ptr + own * 3, opened)
    ends = opened
    tl.store(fine_ptr + own * (most + 2) + ends, 0, mask=left >= CHUNK)
    ends += (left >= CHUNK).to(tl.int32)
    if not CAUSAL:
        tail = (tokens % CHUNK > 0) & (right <= tokens // CHUNK * CHUNK)
        tl.store(fine_ptr + own * (most + 2) + ends, tokens // CHUNK, mask=tail)
        ends += tail.to(tl.int32)
    tl.store(count_ptr + own * 3 + 1, ends)
    done = 0
    if SUMMARIES:
        base = list_ptr + own * room
        whole = visible.to(tl.int32)
        split = fine.to(tl.int32)
        score = tl.where(fine, -float("inf"), score)
        region = chunk
        for level in tl.static_range(TOP - 1):
            here, apart, again, score, above = _coarser(whole, split, score, middle, WIDTHS[level], RATIOS[level])
            done = _listed(base, (whole > 0) & (split == 0) & (again > 0), region, firsts[level], done, room)
            whole = here
            split = apart
            region = above
        done = _listed(base, (whole > 0) & (split == 0), region, firsts[TOP - 1], done, room)
    tl.store(count_ptr + own * 3 + 2, done)


@triton.jit(do_not_specialize=["begin", "blocks", "every", "chunks", "fines", "room"])
def gate_kernel(
    fine_ptr, list_ptr, count_ptr, fine_grad_ptr, list_grad_ptr, grad_ptr, near_grad_ptr, begin, blocks, every, chunks,
    fines, room, firsts,
    G: tl.constexpr, TOP: tl.constexpr, SPANS: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One program: gradients of a block's entries' biases, to the scores of the chunks that they stand for.

    fine_grad (B, H, every, G, fines) and list_grad (B, H, every, G, room) float32. Adds up to grad
    (B, H, blocks, chunks), zeros before, and near_grad (B, H, blocks): what all else loses. SPANS[l]: chunks in a
    region of level l+1.
    """
    number = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    own = pair * every + begin + number
    row = grad_ptr + (pair * blocks + number) * chunks
    slot = tl.arange(0, BF)
    live = slot < tl.load(count_ptr + own * 3)
    told = tl.zeros((BF,), tl.float32)
    for g in tl.static_range(G):
        told += tl.load(fine_grad_ptr + (own * G + g) * fines + slot, mask=live, other=0.0)
    tl.store(row + tl.load(fine_ptr + own * fines + slot, mask=live, other=0), told, mask=live)
    total = tl.sum(told)
    count = tl.load(count_ptr + own * 3 + 2)
    for first in tl.range(0, count, BM):
        place = first + tl.arange(0, BM)
        there = place < count
        line = tl.load(list_ptr + own * room + place, mask=there, other=0)
        share = tl.zeros((BM,), tl.float32)
        for g in tl.static_range(G):
            share += tl.load(list_grad_ptr + (own * G + g) * room + place, mask=there, other=0.0)
        total += tl.sum(share)
        for level in tl.static_range(TOP):
            here = there & (line >= firsts[level])
            if level + 1 < TOP:
                here = here & (line < firsts[level + 1])
            _spread(row, line - firsts[level], share, here, chunks, SPANS[level], BM)
    tl.store(near_grad_ptr + pair * blocks + number, -total)
