"""Search kernels: the mass that voting queries give each chunk.

`ask_kernel` takes every product once and leaves two bytes for a voter and a chunk: a power of two, relative to the
highest of its tile, so that sixteen bits lose nothing that could matter. `mass_kernel` sums these over the voters. A
chunk's logit is that of its best search key; search keys are walked in the order they are kept, by place in the chunk
first, so that the best of a chunk is an element-wise maximum over products of whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mgam.chain_triton import chain
from mgam.policies.one_token_triton import tell

FLOOR = tl.constexpr(-3.3e38)


@triton.jit
def _keys(
    base, place, first, step_place, step_chunk, chunks, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Search keys (BLOCK_C, BLOCK_D) at one place of chunks from `first` on; zero beyond the last chunk."""
    chunk = first + tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_D)
    offset = place * step_place + chunk.to(tl.int64) * step_chunk
    mask = (chunk < chunks)[:, None]
    if D < BLOCK_D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _queries(base, line, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = live[:, None]
    if D < BLOCK_D:
        mask = mask & (column < D)[None, :]
    return tl.load(base + line.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["blocks", "heads", "tiles", "chunks", "cuts"],
    do_not_specialize_on_alignment=["row_ptr", "visible_ptr", "live_ptr"],
)
def ask_kernel(
    q_ptr, factor_ptr, power_ptr, share_ptr, search_ptr, row_ptr, visible_ptr, live_ptr, blocks, heads, tiles, chunks,
    cuts, step_row, step_head, step_place, step_chunk, desc,
    TOGETHER: tl.constexpr, M: tl.constexpr, V: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M voters of one KV head, over all chunks that they may judge, BLOCK_C at a time.

    They are voters of one block, or of TOGETHER blocks of one row that follow one another, where a block has few: the
    keys are walked once for all of them.
    Shapes: q (N, H, M, D), factor (N, H, M) in base 2, row and visible (N,), live (N, V) uint8; search by strides.
    Gives power (N, H, M, cuts * BLOCK_C) float16: two to the power of a chunk's logit over the highest of its tile; and
    share (N, H, M, cuts) float32: what each tile's highest weighs in the voter's softmax, 0 for voters that do not
    count. What lies beyond the last tile with a visible chunk is not written.
    """
    pid = tl.program_id(0)
    groups = tl.cdiv(blocks, TOGETHER)
    first_block = pid // tiles % groups * TOGETHER
    head = pid // tiles // groups
    voter = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    block = first_block + voter // M
    there = (voter < TOGETHER * M) & (block < blocks)
    row = tl.load(row_ptr + first_block)
    visible = tl.load(visible_ptr + block, mask=there, other=0).to(tl.int32)
    line = (block.to(tl.int64) * heads + head) * M + voter % M
    q = _queries(q_ptr, line, there, D, BLOCK_D)
    factor = tl.load(factor_ptr + line, mask=there, other=0.0)
    base = search_ptr + row * step_row + head.to(tl.int64) * step_head
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    chunk = tl.arange(0, BLOCK_C)
    power_ptr += line[:, None] * (cuts * BLOCK_C) + chunk[None, :]
    share_ptr += line * cuts
    most = tl.cdiv(tl.max(visible, 0), BLOCK_C)
    for step in tl.range(0, most * S):
        first = step // S * BLOCK_C
        if COPY:
            k = desc.load([row.to(tl.int32), head, step % S, first, 0]).reshape(BLOCK_C, BLOCK_D)
        else:
            k = _keys(base, step % S, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
        best = tl.maximum(best, tl.dot(q, tl.trans(k), input_precision="ieee"))
        if step % S == S - 1:
            logits = tl.where((first + chunk)[None, :] < visible[:, None], best * factor[:, None], -float("inf"))
            own = tl.maximum(tl.max(logits, 1), FLOOR)
            power = tl.exp2(logits - own[:, None])
            tl.store(power_ptr + first, power.to(tl.float16), mask=there[:, None])
            tl.store(share_ptr + first // BLOCK_C, own, mask=there)
            highest = tl.maximum(peak, own)
            total = total * tl.exp2(peak - highest) + tl.sum(power, 1) * tl.exp2(own - highest)
            peak = highest
            best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    live = tl.load(live_ptr + block.to(tl.int64) * V + voter % M % V, mask=there, other=0)
    weight = tl.where((live > 0) & (total > 0), 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    tl.debug_barrier()  # what other threads of this program have stored is read from here on
    for cut in tl.range(0, most):
        own = tl.load(share_ptr + cut, mask=there, other=FLOOR)
        tl.store(share_ptr + cut, tl.exp2(own - peak) * weight, mask=there)


@triton.jit(do_not_specialize=["heads", "tiles", "chunks", "cuts"], do_not_specialize_on_alignment=["visible_ptr"])
def mass_kernel(
    power_ptr, share_ptr, visible_ptr, score_ptr, heads, tiles, chunks, cuts,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One program: mass of BLOCK_C chunks of a block and head, from what `ask_kernel` leaves with tiles of CUT chunks.

    score (N, H, chunks) float32, 0 where a chunk may not be judged.
    """
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_C
    cut = first // CUT + tl.arange(0, BLOCK_C // CUT)
    chunk = cut[:, None] * CUT + tl.arange(0, CUT)[None, :]
    visible = tl.load(visible_ptr + pair // heads).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_C // CUT, CUT), tl.float32)
    if first < visible:
        for start in tl.range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            line = pair * M + m
            power = tl.load(
                power_ptr + line[:, None, None] * (cuts * CUT) + chunk[None],
                mask=(m < M)[:, None, None] & (chunk < visible)[None], other=0.0,
            )  # fmt: skip
            share = tl.load(
                share_ptr + line[:, None] * cuts + cut[None, :],
                mask=(m < M)[:, None] & (cut * CUT < visible)[None, :], other=0.0,
            )  # fmt: skip
            total += power.to(tl.float32) * share[:, :, None]
    tl.store(score_ptr + pair * chunks + chunk, tl.sum(total, 0), mask=chunk < chunks)


@triton.jit
def _short(q, basis_ptr, line, D: tl.constexpr, SHORT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Rows (M, D) in the basis of `line` (row and head), before rounding: (M, BLOCK_S) float32."""
    column = tl.arange(0, BLOCK_D)
    short = tl.arange(0, BLOCK_S)
    basis = tl.load(
        basis_ptr + (line * D + column)[:, None] * SHORT + short[None, :],
        mask=(column < D)[:, None] & (short < SHORT)[None, :], other=0.0,
    )  # fmt: skip
    return tl.dot(q, basis.to(q.dtype), input_precision="ieee")


@triton.jit(
    do_not_specialize=["blocks", "heads", "tiles", "chunks"],
    do_not_specialize_on_alignment=["row_ptr", "visible_ptr", "length_ptr"],
)
def logits_kernel(
    q_ptr, factor_ptr, logit_ptr, part_ptr, search_ptr, row_ptr, visible_ptr, basis_ptr, blocks, heads, tiles, chunks,
    step_row, step_head, step_place, step_chunk, scale, length_ptr, table_ptr, live_ptr, ticket_ptr,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BLOCK_W: tl.constexpr, MOST: tl.constexpr, NOW: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr, ALIKE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """For few voters (decode): logits in base 2 (N, H, M, C), -inf where a chunk may not be judged. M <= BLOCK_M.

    Parts (2, N, H, M, tiles) float32: the highest logit of each tile of chunks, and its sum of powers relative to that.
    WIDE > 0: voters (N, H, M, WIDE) are shortened here by basis_ptr (B, H, WIDE, D), as `project_kernel` does it;
    factor_ptr (B, H) is then the step of the keys. NOW: block n is the new token of row n, the last of length_ptr (N,),
    and the tables of `Now` are written here; row_ptr and visible_ptr are not read.
    ALIKE: the factor of all voters is `scale`, and factor_ptr is not read.
    """
    if CHAINED:
        chain()
    pid = tl.program_id(0)
    first = pid % tiles * BLOCK_C
    block = pid // tiles % blocks
    head = pid // tiles // blocks
    if NOW:
        row = block.to(tl.int64)
        visible = tell(
            length_ptr, table_ptr, live_ptr, ticket_ptr, block, head, blocks, heads, pid % tiles == 0, WINDOW, CHUNK
        )
    else:
        row = tl.load(row_ptr + block)
        visible = tl.load(visible_ptr + block).to(tl.int32)
    pair = block.to(tl.int64) * heads + head
    m = tl.arange(0, BLOCK_M)
    chunk = first + tl.arange(0, BLOCK_C)
    best = tl.full((BLOCK_M, BLOCK_C), -float("inf"), tl.float32)
    if first < visible:
        base = search_ptr + row * step_row + head.to(tl.int64) * step_head
        early = ()  # keys that are on their way while voters are shortened
        for place in tl.static_range(EARLY):
            keys = _keys(base, place, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
            early += (keys,)  # type: ignore[assignment]
        if WIDE > 0:
            whole = _queries(q_ptr + pair * M * WIDE, m, m < M, WIDE, BLOCK_W)
            short = _short(whole, basis_ptr, row * heads + head, WIDE, D, BLOCK_W, BLOCK_D)
            own = tl.maximum(tl.max(tl.abs(short), 1), 1e-20) / MOST
            q = (short / own[:, None]).to(search_ptr.dtype.element_ty)
            factor = own * scale * tl.load(factor_ptr + row * heads + head)
        else:
            q = _queries(q_ptr + pair * M * D, m, m < M, D, BLOCK_D)
            factor = tl.full((BLOCK_M,), 1.0, tl.float32) * scale
            if not ALIKE:
                factor = tl.load(factor_ptr + pair * M + m, mask=m < M, other=0.0)
        for place in tl.range(EARLY, S):
            k = _keys(base, place, first, step_place, step_chunk, chunks, D, BLOCK_C, BLOCK_D)
            best = tl.maximum(best, tl.dot(q, tl.trans(k), input_precision="ieee"))
        for place in tl.static_range(EARLY):
            best = tl.maximum(best, tl.dot(q, tl.trans(early[place]), input_precision="ieee"))
        best = tl.where((chunk < visible)[None, :], best * factor[:, None], -float("inf"))
    place_mc = (pair * M + m)[:, None] * chunks + chunk[None, :]
    tl.store(logit_ptr + place_mc, best, mask=(m < M)[:, None] & (chunk < chunks)[None, :])
    peak = tl.maximum(tl.max(best, 1), FLOOR)
    total = tl.sum(tl.exp2(best - peak[:, None]), 1)
    place_mt = (pair * M + m) * tiles + pid % tiles
    tl.store(part_ptr + place_mt, peak, mask=m < M)
    size = blocks.to(tl.int64) * heads * M * tiles
    tl.store(part_ptr + size + place_mt, total, mask=m < M)


@triton.jit(
    do_not_specialize=["blocks", "heads", "tiles", "chunks", "width"], do_not_specialize_on_alignment=["live_ptr"]
)
def few_kernel(
    logit_ptr, part_ptr, live_ptr, score_ptr, blocks, heads, tiles, chunks, width,
    M: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """After `logits_kernel`: mass of one tile of chunks. live (N, V) uint8; score (N, H, width) float32, of
    which the first C are written."""
    pid = tl.program_id(0)
    pair = (pid // tiles).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    size = blocks.to(tl.int64) * heads * M * tiles
    for begin in tl.range(0, tiles, BLOCK_T):
        tile = begin + tl.arange(0, BLOCK_T)
        place = (pair * M + m)[:, None] * tiles + tile[None, :]
        mask = (m < M)[:, None] & (tile < tiles)[None, :]
        peaks = tl.load(part_ptr + place, mask=mask, other=FLOOR)
        totals = tl.load(part_ptr + size + place, mask=mask, other=0.0)
        highest = tl.maximum(peak, tl.max(peaks, 1))
        total = total * tl.exp2(peak - highest) + tl.sum(totals * tl.exp2(peaks - highest[:, None]), 1)
        peak = highest
    live = tl.load(live_ptr + pair // heads * V + m % V, mask=m < M, other=0)
    share = tl.where((live > 0) & (total > 0), 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    chunk = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    place = (pair * M + m)[:, None] * chunks + chunk[None, :]
    logits = tl.load(logit_ptr + place, mask=(m < M)[:, None] & (chunk < chunks)[None, :], other=-float("inf"))
    score = tl.sum(tl.exp2(logits - peak[:, None]) * share[:, None], 0)
    tl.store(score_ptr + pair * width + chunk, score, mask=chunk < chunks)


@triton.jit(do_not_specialize=["heads", "tiles", "M"], do_not_specialize_on_alignment=["row_ptr"])
def project_kernel(
    state_ptr, basis_ptr, offset_ptr, step_ptr, short_ptr, factor_ptr, row_ptr, heads, tiles, scale,
    state_block, state_place, state_head, state_row, short_block, short_place, short_head, short_row,
    M, V: tl.constexpr, PLACES: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BY_ROW: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Rows in fewer dimensions and bits: (state - mean) @ basis, over a step.

    Rows m of block n and KV head h: query head h * (M // V) + m // V and voter m % V where GROUPED, else row m of
    (n, h). Blocks n are rows of a batch by PLACES in a chunk where these are several.
    basis (B, H, D, SHORT); offset (B, H, SHORT): the mean in the basis; BY_ROW: each row has its own step, found
    here, and
    factor (N, H, M) gets step * scale * step_ptr[row, h]; else step_ptr (B, H) is the step. MOST: largest number kept.
    """
    pid = tl.program_id(0)
    pair = (pid // tiles).to(tl.int64)
    block = pair // heads
    head = pair % heads
    spot = block % PLACES
    if BY_ROW:  # noqa: SIM108  (a constant of the kernel: the other branch must not be compiled)
        row = tl.load(row_ptr + block)
    else:
        row = block // PLACES
    state_ptr += block // PLACES * state_block + spot * state_place
    short_ptr += block // PLACES * short_block + spot * short_place
    m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    short = tl.arange(0, BLOCK_S)
    live = m < M
    if GROUPED:
        place = (head * (M // V) + m // V) * state_head + (m % V) * state_row
    else:
        place = head * state_head + m.to(tl.int64) * state_row
    state = tl.load(state_ptr + place[:, None] + column[None, :], mask=live[:, None] & (column < D)[None, :], other=0.0)
    found = _short(state, basis_ptr, row * heads + head, D, SHORT, BLOCK_D, BLOCK_S)
    step = tl.load(step_ptr + row * heads + head)
    if BY_ROW:
        own = tl.maximum(tl.max(tl.abs(found), 1), 1e-20) / MOST
        tl.store(factor_ptr + pair * M + m, own * scale * step, mask=live)
        found = found / own[:, None]
    else:
        offset = tl.load(offset_ptr + (row * heads + head) * SHORT + short, mask=short < SHORT, other=0.0)
        found = tl.minimum(tl.maximum((found - offset[None, :]) / step, -2.0 * MOST), 2.0 * MOST)
    target = head * short_head + m.to(tl.int64) * short_row
    tl.store(
        short_ptr + target[:, None] + short[None, :],
        found.to(short_ptr.dtype.element_ty),
        mask=live[:, None] & (short < SHORT)[None, :],
    )


@triton.jit(do_not_specialize=["heads", "width"], do_not_specialize_on_alignment=["window_ptr"])
def split_kernel(
    opened_ptr, window_ptr, lists, heads, width, rooms, sizes,
    CHUNK: tl.constexpr, TOP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Summaries of one level that complete a partition, sorted: one program per block and head, and level.

    opened_ptr (N, H, width) sorted chunks, -1 at the end; window_ptr (N,); lists[l-1] (N, H, rooms[l-1]), -1 at the
    end; sizes[l-1]: tokens per chunk of level l.
    """
    pair = tl.program_id(0).to(tl.int64)
    window = tl.load(window_ptr + pair // heads)
    slot = tl.arange(0, BLOCK_K)
    token = tl.load(opened_ptr + pair * width + slot, mask=slot < width, other=-1) * CHUNK
    for level in tl.static_range(TOP):
        if tl.program_id(1) == level:
            size = sizes[level]
            room = rooms[level]
            list_ptr = lists[level] + pair * room
            opened = tl.where(token < 0, -1, token // size)
            count = tl.sum(slot * 0, 0)
            complete = (window // size).to(tl.int32)
            for first in tl.range(0, complete, BLOCK):
                index = first + tl.arange(0, BLOCK)
                same = index[None, :] == opened[:, None]
                split = tl.max(same.to(tl.int32), 0) > 0
                if level > 0:
                    split = split | (index == 0)
                read = (index < complete) & (split == 0)
                if level + 1 < TOP:
                    over = sizes[level + 1]
                    up = (index.to(tl.int64) * size // over).to(tl.int32)
                    within = up[None, :] == tl.where(token < 0, -1, token // over)[:, None]
                    above = (tl.max(within.to(tl.int32), 0) > 0) | (up == 0) | ((up.to(tl.int64) + 1) * over > window)
                    read = read & above
                number = read.to(tl.int32)
                place = count + tl.cumsum(number, 0) - 1
                tl.store(list_ptr + place, index.to(tl.int64), mask=read & (place < room))
                count += tl.sum(number, 0)
            for first in tl.range(count // BLOCK * BLOCK, room, BLOCK):
                place = first + tl.arange(0, BLOCK)
                none = tl.full((BLOCK,), -1, tl.int64)
                tl.store(list_ptr + place, none, mask=(place >= count) & (place < room))
