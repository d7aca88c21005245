"""Launches the read kernel: chooses tiles by shape, allocates results, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.arguments_triton import send
from mgam.attend.triton.lists import Lists
from mgam.attend.triton.prefill import WholeTiles, fits, read_whole
from mgam.attend.triton.read import merge_kernel, read_kernel
from mgam.attend.triton.tables import Turn, biases, block, copyable, described, precision, strides
from mgam.chain_triton import chained
from mgam.kernels import cdiv, power_of_2
from mgam.merge import Part

MANY = 1 << 13
"""Entries from which on reading for one token takes as many parts as there may be: dense reading of long texts."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: rows and entries per tile, warps, pipeline stages, programs per cover."""

    rows: int
    entries: int
    warps: int
    stages: int
    splits: int = 1
    copies: bool = True
    """Whether contiguous tiles come by the copy engine (Hopper and newer)."""
    registers: int | None = None
    """Most registers per thread; fewer let two programs share a multiprocessor."""


def tiles_for(rows: int, dim: int, turned: bool, entries: int, programs: int) -> Tiles:
    """Tile shapes for blocks of `rows` rows (heads of a group x queries), found on an H100."""
    if rows <= 32:
        splits = max(1, min(entries // 64, 64 if entries > MANY else 32, 512 // max(programs, 1)))
        splits = 1 << (splits.bit_length() - 1)  # a kernel is compiled for each number of splits
        return Tiles(16 if rows <= 16 else 32, 64, 4, 3 if programs > 64 or entries > MANY else 2, splits)
    if dim > 128:
        return Tiles(64, 32 if turned else 64, 4, 2)
    if rows <= 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8, 2, registers=128)


def read(
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    *,
    turn: Turn,
    softcap: float | None = None,
    tiles: Tiles | WholeTiles | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    place: Tensor | None = None,
) -> Part:
    """One softmax over each block's cover, without any wait for the device.

    Shapes: queries (N, H*G, Q, D), rows beyond a block's length give zeros; keys[l], values[l] (B, H, n_l, D) with
    any strides
    but the last; out like queries (written where `out` says, if given, by its strides), lse (N, H*G, Q) float32,
    -inf where nothing may be read. `tickets` (N, H) int32, zeros that this call may write: where several programs read
    the cover of one block, the last one merges what they found, and no other launch does. `place` (1,) int64, with
    `tickets`: the address of a contiguous tensor like the queries that gets the result; then `out` need not.
    """
    count, query_heads, size, dim = queries.shape
    heads = keys[0].shape[1]
    group = query_heads // heads
    top = lists.levels.top
    room = sum(part.shape[-1] * (lists.levels.chunk if level == 0 else 1) for level, part in enumerate(lists.index))
    if out is None:
        out = torch.empty_like(queries)  # where queries are a view of a call, so is the result
    if tiles is None and fits(queries, lists, keys, values, turn, WholeTiles()):
        tiles = WholeTiles()
    if isinstance(tiles, WholeTiles):
        return read_whole(queries, lists, keys, values, scale, turn=turn, softcap=softcap, out=out, tiles=tiles)
    if tiles is None:
        reach = keys[0].shape[2] if lists.bare else 1024
        tiles = tiles_for(group * size, dim, turn.pairs > 0, room + reach, count * heads)
    lse = torch.empty(count, query_heads, size, dtype=torch.float32, device=queries.device)
    if not out.numel():
        return Part(out, lse)
    copies = tiles.copies and turn.pairs * 2 in (0, dim) and copyable(keys[0]) and copyable(values[0])
    part_out, part_lse = out[None], lse
    if tiles.splits > 1:
        part_out = torch.empty(tiles.splits, *out.shape, dtype=torch.float32, device=out.device)
        part_lse = torch.empty(tiles.splits, *lse.shape, dtype=torch.float32, device=out.device)
    row_tiles = cdiv(group * size, tiles.rows)
    together = 0
    if tickets is not None and tiles.splits > 1 and row_tiles == 1 and out.is_contiguous():
        together = _together(tiles, group * size, block(dim))
    rest = dim - 2 * turn.pairs
    key_desc, value_desc = keys[0], values[0]
    if copies:
        key_desc = described(keys[0], tiles.entries, block(turn.pairs or dim))
        value_desc = described(values[0], tiles.entries, block(dim))
    read_kernel[(row_tiles * count * heads, tiles.splits)](
        queries, part_out, part_lse, lse if tickets is None else tickets, out, lse, lse if place is None else place,
        lists.blocks, lists.counts, key_desc, value_desc, tuple(keys), tuple(values), strides(keys), strides(values),
        lists.index, lists.ranks, tuple(part.shape[-1] for part in lists.index),
        turn.cos, turn.sin, turn.cos.shape[0] - 1, turn.anchor, scale, softcap or 1.0, biases(lists),
        count, heads, row_tiles, queries.stride(0), queries.stride(1), queries.stride(2), *part_out.stride()[:4],
        G=group, Q=size, CHUNK=lists.levels.chunk, TOP=top, D=dim, R=turn.pairs,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.entries, BLOCK_D=block(dim), BLOCK_R=block(turn.pairs), BLOCK_P=block(rest),
        CAP=softcap is not None, BARE=lists.bare, SPLITS=tiles.splits, PRECISION=precision(queries.dtype),
        COPY=copies, MERGED=together, ROWS=power_of_2(group * size) if together else 1,
        SENT=place is not None and together > 0,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
        **chained(tickets is not None, out.device),
    )  # fmt: skip
    if tiles.splits > 1 and not together:
        merged = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        lines = count * query_heads * size
        merge_kernel[(lines,)](
            part_out, part_lse, merged, lse, lines, D=dim, BLOCK_D=block(dim), SPLITS=tiles.splits,
            BLOCK_S=power_of_2(tiles.splits), num_warps=4 if tiles.splits > 8 else 1,
        )  # fmt: skip
        if merged is not out:
            out.copy_(merged)
    if place is not None and not together:
        send(out, place)
    return Part(out, lse)


def _together(tiles: Tiles, rows: int, columns: int) -> int:
    """Parts that a program merges at a time: as many as leave each thread 128 numbers."""
    each = power_of_2(rows) * columns
    return max(1, min(power_of_2(tiles.splits), 4096 * tiles.warps // each))
