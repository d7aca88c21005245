"""The cover of a block and head in one program: the best chunks, the summaries around them, and every entry's rank.

All is worked out on one line of numbers, one per chunk of level 1: a chunk of a coarser level stands where its first
child does.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _best(bits, most):
    """The number that the `most` highest of `bits` (BLOCK,) reach, -1 or above each: found from the highest bit down,
    two bits at a time, until as many as wanted reach it; 0 where there are no more than wanted."""
    bar = 0
    held = tl.sum((bits >= 0).to(tl.int32), 0)
    step = 1 << 29
    while (step >= 2) & (held > most):
        one = bar + step
        reach = (bits >= one).to(tl.int64)
        reach += (bits >= one + step).to(tl.int64) << 20
        reach += (bits >= one + 2 * step).to(tl.int64) << 40
        count = tl.sum(reach, 0)
        first = (count & 0xFFFFF).to(tl.int32)
        second = ((count >> 20) & 0xFFFFF).to(tl.int32)
        third = (count >> 40).to(tl.int32)
        held = tl.where(third >= most, third, tl.where(second >= most, second, tl.where(first >= most, first, held)))
        bar += step * ((first >= most).to(tl.int32) + (second >= most).to(tl.int32) + (third >= most).to(tl.int32))
        step = step // 4
    if held > most:
        bar = tl.where(tl.sum((bits > bar).to(tl.int32), 0) >= most, bar + 1, bar)
    return bar


@triton.jit
def _family(has, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether any of the SIZE chunks of a family has what `has` (BLOCK,) says, told to each of them."""
    if SIZE == 1:
        return has
    else:
        any_ = tl.max(tl.reshape(has, (BLOCK // SIZE, SIZE)), 1)
        return tl.reshape(tl.broadcast_to(any_[:, None], (BLOCK // SIZE, SIZE)), (BLOCK,))


@triton.jit
def _count(counts, FIELDS: tl.constexpr, field: tl.constexpr):
    """What numbers that hold a count for every list, in bits FIELDS[l] to FIELDS[l+1], say of one list."""
    return ((counts >> FIELDS[field]) & ((1 << (FIELDS[field + 1] - FIELDS[field])) - 1)).to(tl.int32)


@triton.jit
def _list(
    list_ptr, rank_ptr, begins, ends, every, FIELDS: tl.constexpr, field: tl.constexpr, value, rank, room,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes the values and ranks of the entries of one list, in order, and -1 after them; returns how many there
    are."""
    place = _count(ends, FIELDS, field) - 1
    count = _count(every, FIELDS, field)
    there = (_count(begins, FIELDS, field) != 0) & (place < room)
    tl.store(list_ptr + place, value.to(tl.int64), mask=there)
    tl.store(rank_ptr + place, rank.to(tl.int64), mask=there)
    slot = tl.arange(0, BLOCK_K)
    tl.store(list_ptr + slot, tl.full((BLOCK_K,), -1, tl.int64), mask=(slot >= count) & (slot < room))
    return count


@triton.jit
def _mass(
    logit_ptr, part_ptr, live_ptr, pair, pairs, block, index, width, tiles,
    M: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mass (BLOCK,) that few voters give each chunk, from their logits (N, H, M, width) and the parts of their
    normalisers (2, N, H, M, tiles), as `logits_kernel` leaves them; live (N, V) uint8."""
    score = tl.zeros((BLOCK,), tl.float32)
    tile = tl.arange(0, BLOCK_T)
    for m in tl.static_range(M):
        place = (pair * M + m) * tiles + tile
        peaks = tl.load(part_ptr + place, mask=tile < tiles, other=-3.3e38)
        totals = tl.load(part_ptr + pairs * M * tiles + place, mask=tile < tiles, other=0.0)
        logits = tl.load(logit_ptr + (pair * M + m) * width + index, mask=index < width, other=-float("inf"))
        live = tl.load(live_ptr + block * V + m % V)
        peak = tl.max(peaks, 0)
        total = tl.sum(totals * tl.exp2(peaks - peak), 0)
        share = tl.where((live > 0) & (total > 0), 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        score += tl.exp2(logits - peak) * share
    return score


@triton.jit(
    do_not_specialize=["pairs", "heads", "chunks", "width", "most", "tiles"],
    do_not_specialize_on_alignment=["window_ptr", "live_ptr"],
)
def cover_kernel(
    score_ptr, part_ptr, live_ptr, window_ptr, lists, ranks, count_ptr, pairs, heads, chunks, width, most, rooms, tiles,
    M: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, TOP: tl.constexpr,
    RATIOS: tl.constexpr, FIELDS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sink and the `most` best chunks between sink and window, and the summaries that complete a partition.

    score_ptr (N, H, width), none negative, of which `chunks` count; where M > 0, the logits of M voters instead (see
    `_mass`). window_ptr (N,) first tokens of windows. lists[0]
    and ranks[0] (N, H, rooms[0]) get the opened chunks, lists[l] and ranks[l] the summaries of level l (none where REST
    is false), sorted, -1 at the end; count_ptr (N, H, 1+TOP). Among equal scores the earliest win. RATIOS[l]: chunks of
    level 1 in one of level l + 1, powers of two that divide BLOCK. FIELDS[l]: first of the bits that count entries of
    list l, in numbers of 32 bits, or of 64 where WIDE.
    """
    pair = tl.program_id(0).to(tl.int64)
    window = (tl.load(window_ptr + pair // heads) // CHUNK).to(tl.int32)
    index = tl.arange(0, BLOCK)
    if M > 0:
        score = _mass(
            score_ptr, part_ptr, live_ptr, pair, pairs, pair // heads, index, width, tiles, M, V, BLOCK, BLOCK_T
        )
    else:
        score = tl.load(score_ptr + pair * width + index, mask=index < chunks, other=0.0)
    allowed = (index > 0) & (index < chunks) & (index < window)
    bits = tl.where(allowed, score.to(tl.int32, bitcast=True), -1)
    bar = _best(bits, most)
    opened = bits >= bar
    found = tl.sum((bits > bar).to(tl.int64) + (opened.to(tl.int64) << 32), 0)
    above = (found & 0x7FFFFFFF).to(tl.int32)
    if (found >> 32).to(tl.int32) > most:  # of those that stand at the bar the earliest
        opened = (bits > bar) | (opened & (tl.cumsum((bits == bar).to(tl.int32), 0) <= most - above))
    opened = opened | ((index == 0) & (window > 0))
    has = opened.to(tl.int32)
    begins = has.to(tl.int64) if WIDE else has  # which lists have an entry that begins with this chunk
    if REST:
        for level in tl.static_range(TOP):
            begins += _read(has, index, window, level, TOP, RATIOS, BLOCK).to(begins.dtype) << FIELDS[level + 1]
    ends, every = tl.cumsum(begins, 0), tl.sum(begins, 0)
    rank = (_count(ends - begins, FIELDS, 0) - _count(every, FIELDS, 0)) * CHUNK
    for level in tl.static_range(TOP):
        rank += _count(ends - begins, FIELDS, level + 1) - _count(every, FIELDS, level + 1)
    room = rooms[0]
    count = _list(
        lists[0] + pair * room, ranks[0] + pair * room, begins, ends, every, FIELDS, 0, index, rank, room, BLOCK_K
    )
    tl.store(count_ptr + pair * (TOP + 1), count)
    for level in tl.static_range(TOP):
        count = 0
        if REST:
            room = rooms[level + 1]
            count = _list(
                lists[level + 1] + pair * room, ranks[level + 1] + pair * room, begins, ends, every, FIELDS, level + 1,
                index // RATIOS[level], rank, room, BLOCK_K,
            )  # fmt: skip
        tl.store(count_ptr + pair * (TOP + 1) + level + 1, count)


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
