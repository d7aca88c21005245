"""The cover of a block and head in one program: the best chunks, the summaries around them, and every entry's rank.

All is worked out on one line of numbers, one per chunk of level 1: a chunk of a coarser level stands where its first
child does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.chain_triton import chain


@triton.jit
def _best(bits, held, most):
    """The number that the `most` highest of `bits` (BLOCK,) reach, -1 or above each and `held` of them 0 or above; and
    how many reach it. 0 where there are no more than wanted.

    Found from the highest bit down, five bits at a time, until as many as wanted reach it. It is looked for in eight
    powers of two below the highest number first, then anywhere.
    """
    bar = tl.where(held > most, tl.maximum(tl.max(bits, 0) - (1 << 26) + 1, 0), 0)
    shift = 21
    digit = tl.arange(0, 32)
    while (shift >= 0) & (held > most):
        # What lies above these digits counts with the highest, so that counts from above are those of all numbers.
        place = tl.minimum(tl.maximum((bits - bar) >> shift, 0), 31)
        reach = tl.cumsum(tl.histogram(place, 32, mask=bits >= bar), 0, reverse=True)
        # The fewest that are enough, and of digits that as many reach the highest.
        found = tl.min(tl.where(reach >= most, (reach << 5) + 31 - digit, 0x7FFFFFFF), 0)
        if found == 0x7FFFFFFF:
            bar = 0
            shift = 26
        else:
            held = found >> 5
            bar += (31 - (found & 31)) << shift
            shift = tl.where(shift >= 5, shift - 5, shift - 1)
    return bar, held


@triton.jit
def _family(has, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether any of the SIZE chunks of a family has what `has` (BLOCK,) says, told to each of them."""
    if SIZE == 1:
        return has
    else:
        any_ = tl.max(tl.reshape(has, (BLOCK // SIZE, SIZE)), 1)
        return tl.reshape(tl.broadcast_to(any_[:, None], (BLOCK // SIZE, SIZE)), (BLOCK,))


@triton.jit
def _added(numbers, BLOCK: tl.constexpr):
    """Sums of `numbers` (BLOCK,) up to each of them, and of all: within rows of sixteen, then over the rows, which is
    far less work for each thread than one long sum."""
    rows = tl.reshape(numbers, (BLOCK // 16, 16))
    sums = tl.sum(rows, 1)
    before = tl.cumsum(sums, 0) - sums
    return tl.reshape(tl.cumsum(rows, 1) + before[:, None], (BLOCK,)), tl.sum(sums, 0)


@triton.jit
def _count(counts, FIELDS: tl.constexpr, field: tl.constexpr):
    """What numbers that hold a count for every list, in bits FIELDS[l] to FIELDS[l+1], say of one list."""
    return ((counts >> FIELDS[field]) & ((1 << (FIELDS[field + 1] - FIELDS[field])) - 1)).to(tl.int32)


@triton.jit
def _mass(
    logit_ptr, part_ptr, live_ptr, pair, pairs, block, index, width, tiles,
    M: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Mass (BLOCK,) that few voters give each chunk, from their logits (N, H, M, width) and the parts of their
    normalisers (2, N, H, M, tiles), as `logits_kernel` leaves them, of BLOCK_M voters at a time; live (N, V) uint8."""
    score = tl.zeros((BLOCK,), tl.float32)
    tile = tl.arange(0, BLOCK_T)
    for first in tl.static_range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        there = (m < M)[:, None] & (tile < tiles)[None, :]
        place = (pair * M + m)[:, None] * tiles + tile[None, :]
        peaks = tl.load(part_ptr + place, mask=there, other=-3.3e38)
        totals = tl.load(part_ptr + pairs * M * tiles + place, mask=there, other=0.0)
        live = tl.load(live_ptr + block * V + m % V, mask=m < M, other=0)
        logits = tl.load(
            logit_ptr + (pair * M + m)[:, None] * width + index[None, :],
            mask=(m < M)[:, None] & (index < width)[None, :], other=-float("inf"),
        )  # fmt: skip
        peak = tl.max(peaks, 1)
        total = tl.sum(totals * tl.exp2(peaks - peak[:, None]), 1)
        share = tl.where((live > 0) & (total > 0), 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        score += tl.sum(tl.exp2(logits - peak[:, None]) * share[:, None], 0)
    return score


@triton.jit(
    do_not_specialize=["pairs", "heads", "chunks", "width", "most", "tiles"],
    do_not_specialize_on_alignment=["window_ptr", "live_ptr"],
)
def cover_kernel(
    score_ptr, part_ptr, live_ptr, window_ptr, list_ptr, rank_ptr, count_ptr, pairs, heads, chunks, width, most, rooms,
    tiles,
    M: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
    TOP: tl.constexpr, RATIOS: tl.constexpr, FIELDS: tl.constexpr, WIDE: tl.constexpr, FAR: tl.constexpr,
    REST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The sink and the `most` best chunks between sink and window, and the summaries that complete a partition.

    score_ptr (N, H, width), none negative, of which `chunks` count; where M > 0, the logits of M voters instead (see
    `_mass`). window_ptr (N,) first tokens of windows. The lists lie one behind the other, (N, H, rooms[0]) of opened
    chunks, then (N, H, rooms[l]) of the summaries of level l (none where REST is false), and so do their ranks: sorted,
    -1 at the end; FAR: over more places than 31 bits number. count_ptr (N, H, 1+TOP). Among equal scores the earliest
    win. RATIOS[l]: chunks of level 1 in one of level l + 1, powers of two that divide BLOCK. FIELDS[l]: first of the
    bits that count entries of list l, in numbers of 32 bits, or of 64 where WIDE.
    """
    if CHAINED:
        chain()
    pair = tl.program_id(0).to(tl.int64)
    window = (tl.load(window_ptr + pair // heads) // CHUNK).to(tl.int32)
    index = tl.arange(0, BLOCK)
    if M > 0:
        score = _mass(
            score_ptr, part_ptr, live_ptr, pair, pairs, pair // heads, index, width, tiles, M, V, BLOCK, BLOCK_T,
            BLOCK_M,
        )  # fmt: skip
    else:
        score = tl.load(score_ptr + pair * width + index, mask=index < chunks, other=0.0)
    stop = tl.minimum(chunks, window)
    bits = tl.where((index > 0) & (index < stop), tl.maximum(score.to(tl.int32, bitcast=True), 0), -1)
    bar, held = _best(bits, tl.maximum(stop - 1, 0), most)
    opened = bits >= bar
    if held > most:  # of those that stand at the bar the earliest
        above = tl.sum((bits > bar).to(tl.int32), 0)
        opened = (bits > bar) | (opened & (_added((bits == bar).to(tl.int32), BLOCK)[0] <= most - above))
    opened = opened | ((index == 0) & (window > 0))
    has = opened.to(tl.int32)
    # No token is read twice, so that at most one list has an entry that begins with a chunk.
    begins = has.to(tl.int64) if WIDE else has
    value = index
    if REST:
        for level in tl.static_range(TOP):
            read = _read(has, index, window, level, TOP, RATIOS, BLOCK)
            begins += read.to(begins.dtype) << FIELDS[level + 1]
            value = tl.where(read, index // RATIOS[level], value)
    ends, every = _added(begins, BLOCK)
    left = every - ends + begins
    rank = -CHUNK * _count(left, FIELDS, 0)
    target = tl.full((BLOCK,), -1, tl.int64 if FAR else tl.int32)
    slot = tl.arange(0, BLOCK_K)
    first = pair * 0
    for list_ in tl.static_range(TOP + 1):
        room = rooms[list_]
        count = _count(every, FIELDS, list_)
        place = _count(ends, FIELDS, list_) - 1
        at = first + pair * room
        target = tl.where((_count(begins, FIELDS, list_) != 0) & (place < room), at.to(target.dtype) + place, target)
        none = tl.full((BLOCK_K,), -1, tl.int64)
        tl.store(list_ptr + at + slot, none, mask=(slot >= count) & (slot < room))
        tl.store(count_ptr + pair * (TOP + 1) + list_, count)
        first += pairs.to(tl.int64) * room
        if list_ > 0:
            rank -= _count(left, FIELDS, list_)
    tl.store(list_ptr + target, value.to(tl.int64), mask=target >= 0)
    tl.store(rank_ptr + target, rank.to(tl.int64), mask=target >= 0)


@triton.jit
def _read(has, index, window, level: tl.constexpr, TOP: tl.constexpr, RATIOS: tl.constexpr, BLOCK: tl.constexpr):
    """Which chunks of level `level` + 1 are read as summaries, marked where they begin: those that are complete and
    hold nothing opened, of parents that are neither."""
    size: tl.constexpr = RATIOS[level]
    complete = (index // size + 1) * size <= window
    read = complete & (_family(has, size, BLOCK) == 0) & (index % size == 0)
    if level + 1 < TOP:
        over: tl.constexpr = RATIOS[level + 1]
        read = read & ((_family(has, over, BLOCK) > 0) | ((index // over + 1) * over > window))
    return read
