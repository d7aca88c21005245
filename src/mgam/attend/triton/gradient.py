"""Launches the backward kernels: inverts the lists, allocates gradients, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.attend.triton.backward import bucket_kernel, delta_kernel, entry_grad_kernel, query_grad_kernel
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.prefill import WholeTiles, fits, pieces
from mgam.attend.triton.tables import STEP, Turn, biases, block, copyable, described, precision, strides
from mgam.attend.triton.whole_backward import whole_query_grad_kernel
from mgam.attend.triton.whole_entries import turn_queries_kernel, whole_entry_grad_kernel
from mgam.kernels import cdiv, power_of_2
from mgam.merge import Part

WHOLE = WholeTiles(rows=128, entries=64, warps=8, stages=3, registers=None)
PROGRAMS = 2048
SUMMARY_PARTS = 32
SINK_PARTS = 16
"""Programs that share the readers of what nearly all blocks read: coarse summaries, and the first chunk."""
TILE = 16
"""Summaries whose gradients one program sums: about the children that one parent has. Whole tiles take more."""
ENTRY_ROWS = {False: (64, 32, 16), True: (32, 16)}
ENTRY_STAGES = {False: 2, True: 3}
"""Queries at a time, in whole tiles, the first that divides a block, and stages of the pipeline; where entries are
turned, which takes registers, too. Found on an H200."""


@dataclass(frozen=True)
class Readers:
    """Who reads what of one level: for unit u of (row, head), `order[begin:end]`, less `shift`, are the places in a
    list (N, H, width) that read it, in their order, so that sums have a fixed one."""

    size: int
    """Entries of a unit: the tokens of a chunk, or neighbouring summaries."""
    units: int
    width: int
    shift: int
    begin: Tensor
    end: Tensor
    order: Tensor
    index: Tensor
    ranks: Tensor


def readers(lists: Lists, turn: Turn, rows: int, counts: Sequence[int], tile: int) -> list[Readers | None]:
    """The readers of each level of `counts[l]` entries a row and KV head: of chunks on level 0, those of the window
    among them, and of `tile` neighbours above. None where nobody reads.

    All places of all levels are sorted at once. Waits for the device only where nobody knows how far windows reach.
    """
    device, chunk = lists.counts.device, lists.levels.chunk
    blocks, heads = lists.counts.shape[:2]
    reach = _reach(lists)
    widths = tuple(part.shape[-1] for part in lists.index)
    units = tuple(cdiv(count, chunk if level == 0 else tile) for level, count in enumerate(counts))
    places = [blocks * heads * width for width in (widths[0] + reach, *widths[1:])]
    buckets = [rows * heads * count for count in units]
    found = torch.empty(sum(places), dtype=torch.int32, device=device)
    if not found.numel():
        return [None] * len(counts)
    ranks = lists.index[0]
    if turn.pairs:
        ranks = torch.empty(blocks, heads, widths[0] + reach, dtype=torch.int64, device=device)
    bucket_kernel[(blocks * heads,)](
        lists.blocks, lists.index, lists.ranks[0], found, ranks, widths, units, sum(buckets), blocks, heads, rows,
        reach, CHUNK=chunk, TILE=tile, TOP=lists.levels.top, RANKS=turn.pairs > 0, BLOCK=64, num_warps=1,
    )  # fmt: skip
    ordered, order = found.sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(sum(buckets) + 1, dtype=torch.int32, device=device))
    levels: list[Readers | None] = []
    for level in range(len(counts)):
        first, shift = sum(buckets[:level]), sum(places[:level])
        begin, end = edges[first:], edges[first + 1 :]
        own = lists.index[level], ranks if level == 0 else lists.ranks[level]
        size, width = (chunk, widths[0] + reach) if level == 0 else (tile, widths[level])
        there = width > 0 and units[level] > 0
        levels.append(Readers(size, units[level], width, shift, begin, end, order, *own) if there else None)
    return levels


def _reach(lists: Lists) -> int:
    """Chunks that a window and its block touch at most."""
    if lists.where is not None:
        return max(0, lists.where.touched)
    _, start, length, window = lists.blocks
    chunk = lists.levels.chunk
    return max(0, int(((start + length - 1) // chunk - window // chunk).max()) + 1)


def gradients(
    grad: Tensor,
    part: Part,
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    *,
    turn: Turn,
    softcap: float | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of queries (N, H*G, Q, D), and of keys and values (B, H, n_l, D) per level."""
    grad = grad.contiguous()
    count, query_heads, size, dim = queries.shape
    delta = torch.empty(count, query_heads, size, dtype=torch.float32, device=queries.device)
    delta_kernel[(cdiv(delta.numel(), 32),)](
        grad, part.out, delta, delta.numel(), query_heads, size, *part.out.stride()[:3], D=dim, BLOCK_D=block(dim),
        BLOCK_M=32, num_warps=4,
    )  # fmt: skip
    dq = _query_grads(grad, delta, part.lse, queries, lists, keys, values, scale, turn, softcap)
    whole = fits(queries, lists, keys, values, turn, WHOLE) and lists.levels.chunk % WHOLE.entries == 0
    far = (turn.far(keys[0].shape[2]) if turn.pairs else (turn.cos, turn.sin)) if whole else None
    turned = queries if far is None else _turned(queries, lists, turn, far)
    counts = [level.shape[2] for level in keys]
    found = readers(lists, turn, keys[0].shape[0], counts, WHOLE.entries if whole else TILE)
    made = []
    for level, reads in enumerate(found):
        if reads is None:
            made.append(torch.zeros(2, *keys[level].shape, dtype=keys[level].dtype, device=keys[level].device))
            continue
        states = keys[level], values[level]
        made.append(
            _entry_grads(level, reads, grad, delta, part.lse, turned, lists, *states, scale, turn, softcap, far)
        )
    return dq, [both[0] for both in made], [both[1] for both in made]


def _turned(queries: Tensor, lists: Lists, turn: Turn, far: tuple[Tensor, Tensor]) -> Tensor:
    """Queries as whole tiles of entries' gradients take them: turned by their true positions where anything is."""
    count, query_heads, size, _ = queries.shape
    if not turn.pairs:
        return queries if copyable(queries) else queries.contiguous()
    turned = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    turn_queries_kernel[(size // WHOLE.entries * count * query_heads,)](
        queries, turned, lists.blocks, turn.cos, turn.sin, *far, count, query_heads,
        *queries.stride()[:3], Q=size, R=turn.pairs, STEP=STEP, BLOCK_M=WHOLE.entries, num_warps=4,
    )  # fmt: skip
    return turned


def _query_grads(
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    turn: Turn,
    softcap: float | None,
) -> Tensor:
    count, query_heads, size, dim = queries.shape
    heads = keys[0].shape[1]
    group = query_heads // heads
    dq = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if fits(queries, lists, keys, values, turn, WHOLE):
        row_tiles = group * size // WHOLE.rows
        for piece in pieces(queries, lists, keys, values, turn, WHOLE):
            some, part = piece.some, piece.lists
            asked = queries[some]
            whole_query_grad_kernel[(row_tiles * asked.shape[0] * heads,)](
                asked, grad[some], lse[some], delta[some], dq[some], part.blocks, part.counts, part.index[0],
                piece.bias, *piece.descriptors, turn.cos, turn.sin, *piece.far, scale, softcap or 1.0, asked.shape[0],
                heads, row_tiles, piece.few, part.index[0].shape[-1], piece.bias.shape[-1], piece.lowest,
                *asked.stride()[:3],
                G=group, Q=size, D=dim, BLOCK_M=WHOLE.rows, CAP=softcap is not None,
                PRECISION=precision(queries.dtype), num_warps=WHOLE.warps, num_stages=WHOLE.stages,
                maxnreg=WHOLE.registers, **piece.constants,
            )  # fmt: skip
        return dq
    tile = _row_tile(group * size, dim)
    tiles = cdiv(group * size, tile)
    query_grad_kernel[(tiles * count * heads,)](
        queries, grad, lse, delta, dq, lists.blocks, lists.counts, tuple(keys), tuple(values), strides(keys),
        strides(values),
        lists.index, lists.ranks, tuple(part.shape[-1] for part in lists.index),
        turn.cos, turn.sin, turn.cos.shape[0] - 1, turn.anchor, scale, softcap or 1.0, biases(lists),
        count, heads, tiles, queries.stride(0), queries.stride(1), queries.stride(2),
        G=group, Q=size, CHUNK=lists.levels.chunk, TOP=lists.levels.top, D=dim, R=turn.pairs,
        BLOCK_M=tile, BLOCK_N=64 if dim <= 128 else 32, BLOCK_D=block(dim), BLOCK_R=block(turn.pairs),
        BLOCK_P=block(dim - 2 * turn.pairs), CAP=softcap is not None, BARE=lists.bare,
        PRECISION=precision(queries.dtype),
        num_warps=8 if tile == 128 else 4, num_stages=2,
    )  # fmt: skip
    return dq


def _entry_grads(
    level: int,
    reads: Readers,
    grad: Tensor,
    delta: Tensor,
    lse: Tensor,
    queries: Tensor,
    lists: Lists,
    keys: Tensor,
    values: Tensor,
    scale: float,
    turn: Turn,
    softcap: float | None,
    far: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Gradients of one level's keys and values (2, B, H, n, D). `far`: turns by whole steps, where the call is made of
    whole tiles."""
    _, query_heads, size, dim = queries.shape
    rows, heads, count, _ = keys.shape
    group, units = query_heads // heads, reads.units
    made = torch.empty(2, *keys.shape, dtype=keys.dtype, device=keys.device)
    across = max(16, min(64 if dim <= 128 else 32, power_of_2(reads.size)))
    if far is not None:
        across = WHOLE.entries
    subs = cdiv(reads.size, across)
    relative = level == 0 and turn.rotary is not None and turn.rotary.compose(queries.device)

    def launch(first: int, last: int, splits: int) -> None:
        """Units `first` to `last`, each by so many programs."""
        span = slice(first * reads.size, min(last * reads.size, count))
        kept, origin = (count, 0) if splits == 1 else (span.stop - span.start, span.start)
        into = made
        if splits > 1:
            into = torch.empty(2, splits, rows, heads, kept, dim, dtype=torch.float32, device=made.device)
        tables = lists.blocks, reads.begin, reads.end, reads.order, reads.index, reads.ranks, turn.cos, turn.sin
        sizes = rows * heads, units, first, count, kept, origin, reads.width, reads.shift
        grid = (subs * splits * rows * heads * (last - first),)
        if far is not None:
            turns = turn.pairs > 0
            below = next(most for most in ENTRY_ROWS[turns] if size % most == 0)
            whole_entry_grad_kernel[grid](
                described(queries, below, dim // 2), described(grad, below, dim), lse, delta, keys, values, *into,
                *tables, *far, scale, softcap or 1.0, biases(lists)[level], lists.blocks.shape[1], heads,
                *sizes, *keys.stride()[:3], *values.stride()[:3],
                G=group, Q=size, KIND=0 if level == 0 else 1, OPENED_WIDTH=lists.index[0].shape[-1], UNIT=reads.size,
                SUBS=subs, SPLITS=splits, D=dim, R=turn.pairs, STEP=STEP, BLOCK_M=below, BLOCK_N=across,
                CAP=softcap is not None, PRECISION=precision(queries.dtype), num_warps=4,
                num_stages=ENTRY_STAGES[turns],
            )  # fmt: skip
        else:
            entry_grad_kernel[grid](
                queries, grad, lse, delta, keys, values, *into, *tables, turn.cos.shape[0] - 1, turn.anchor,
                scale, softcap or 1.0, biases(lists)[level], lists.blocks.shape[1], heads, *sizes,
                *keys.stride()[:3], *values.stride()[:3], *queries.stride()[:3],
                G=group, Q=size, KIND=0 if level == 0 else 1, OPENED_WIDTH=lists.index[0].shape[-1], UNIT=reads.size,
                SUBS=subs, SPLITS=splits, D=dim, R=turn.pairs, BLOCK_M=_row_tile(group * size, dim, 64),
                BLOCK_N=across, BLOCK_D=block(dim), BLOCK_R=block(turn.pairs), BLOCK_P=block(dim - 2 * turn.pairs),
                CAP=softcap is not None, BARE=lists.bare, RELATIVE=relative, PRECISION=precision(queries.dtype),
                num_warps=8 if across == 64 else 4, num_stages=2,
            )  # fmt: skip
        if splits > 1:
            made[:, :, :, span] = into.sum(1)

    if level == 0:  # every block opens the first chunk: alone it would take longer than all others together
        launch(0, 1, SINK_PARTS)
        if units > 1:
            launch(1, units, 1)
    else:
        launch(0, units, max(1, min(SUMMARY_PARTS, PROGRAMS // (rows * heads * units))))
    return made


def _row_tile(rows: int, dim: int, most: int = 128) -> int:
    return max(16, min(most if dim <= 128 else 64, power_of_2(rows)))
