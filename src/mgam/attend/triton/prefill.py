"""Launches the reading of whole tiles: gathers what is not neighbours, allocates, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import STEP, Turn, biases, copyable, described, precision, strides
from mgam.attend.triton.whole import gather_kernel, open_kernel, turn_kernel, whole_kernel
from mgam.kernels import at_once
from mgam.merge import Part

FAR_BYTES = 1 << 30
"""Gathered keys and values kept at a time."""


@dataclass(frozen=True)
class WholeTiles:
    """Rows and entries of a tile, warps, pipeline stages, most registers per thread (so that two programs share a
    multiprocessor)."""

    rows: int = 128
    entries: int = 64
    warps: int = 8
    stages: int = 2
    registers: int | None = 128


def fits(
    queries: Tensor, lists: Lists, keys: Sequence[Tensor], values: Sequence[Tensor], turn: Turn, tiles: WholeTiles
) -> bool:
    """Whether a call is made of whole tiles: blocks that are full, begin and have their windows on tile borders."""
    dim, size = queries.shape[3], queries.shape[2]
    rows = queries.shape[1] // keys[0].shape[1] * size
    return (
        lists.even % tiles.entries == 0
        and size == lists.size
        and size % tiles.entries == 0
        and rows % tiles.rows == 0
        and (not lists.index[0].shape[-1] or lists.levels.chunk % tiles.entries == 0)
        and dim in (16, 32, 64, 128)
        and (turn.pairs == 0 or (2 * turn.pairs == dim and turn.composes))
        and copyable(keys[0])
        and copyable(values[0])
    )


def read_whole(
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    *,
    turn: Turn,
    softcap: float | None,
    out: Tensor,
    tiles: WholeTiles,
) -> Part:
    """As `mgam.attend.triton.forward.read`, for calls that `fits`."""
    count, query_heads, size, dim = queries.shape
    heads = keys[0].shape[1]
    lse = torch.empty(count, query_heads, size, dtype=torch.float32, device=queries.device)
    placed, lowest, far = keys[0], 0, (turn.cos, turn.sin)
    if turn.pairs:
        far = turn.far(keys[0].shape[2])
    opened = lists.index[0].shape[-1] * lists.levels.chunk
    few = opened if turn.pairs else 0
    rest = sum(part.shape[-1] for part in lists.index[1:])
    room = triton.cdiv(rest, tiles.entries) * tiles.entries
    each = heads * (few + 2 * room) * dim * queries.element_size()
    row_tiles = query_heads // heads * size // tiles.rows
    step = at_once(count, max(1, FAR_BYTES // each), heads * row_tiles, 2, queries.device) if each else count
    value_desc = described(values[0], tiles.entries, dim)
    group = query_heads // heads
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        part, asked, told = lists[some] if step < count else lists, queries[some], out[some]
        far_keys, far_values, bias = _gathered(part, keys, values, turn, far, few, room, tiles.entries)
        blocks = asked.shape[0]
        if turn.pairs:
            assert part.where is not None
            lowest, highest = int(part.where[1].min()), int(part.where[0].max()) + size
            placed = _turned(keys[0], turn, far, tiles.entries, lowest, highest)
        key_desc = described(placed, tiles.entries, dim)
        whole_kernel[(row_tiles * blocks * heads,)](
            asked, told, lse[some], part.blocks, part.counts, part.index[0], bias, key_desc, value_desc,
            described(far_keys, tiles.entries, dim) if far_keys.numel() else key_desc,
            described(far_values, tiles.entries, dim) if far_values.numel() else value_desc,
            turn.cos, turn.sin, *far, scale, softcap or 1.0, blocks, heads, row_tiles, few, part.index[0].shape[-1],
            room, lowest, *asked.stride()[:3], *told.stride()[:3],
            G=group, Q=size, CHUNK=lists.levels.chunk, TOP=lists.levels.top, D=dim, R=turn.pairs, STEP=STEP,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.entries, OPENED=opened > 0, SUMMARIES=room > 0, CAP=softcap is not None,
            PRECISION=precision(queries.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
            maxnreg=tiles.registers,
        )  # fmt: skip
    return Part(out, lse)


def _turned(keys: Tensor, turn: Turn, far: tuple[Tensor, Tensor], entries: int, lowest: int, highest: int) -> Tensor:
    """Tokens `lowest` to `highest`, a whole number of tiles, of keys (B, H, n, D), turned by their true positions."""
    batch, heads, tokens, dim = keys.shape
    room = highest - lowest
    turned = torch.empty(batch, heads, room, dim, dtype=keys.dtype, device=keys.device)
    turn_kernel[(room // entries, batch * heads)](
        turned, keys, keys.stride()[:3], turn.cos, turn.sin, *far, heads, tokens, room, lowest,
        R=turn.pairs, STEP=STEP, BLOCK_N=entries, num_warps=4,
    )  # fmt: skip
    return turned


def _gathered(
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    turn: Turn,
    far: tuple[Tensor, Tensor],
    few: int,
    room: int,
    entries: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (N, H, few + room, D), values (N, H, room, D) and log masses (N, H, room) of what lies before the window."""
    count, heads = lists.counts.shape[:2]
    dim, device, dtype = keys[0].shape[3], keys[0].device, keys[0].dtype
    far_keys = torch.empty(count, heads, few + room, dim, dtype=dtype, device=device)
    far_values = torch.empty(count, heads, room, dim, dtype=dtype, device=device)
    bias = torch.empty(count, heads, room, dtype=torch.float32, device=device)
    if few:
        tiles = few // entries
        open_kernel[(tiles * count * heads,)](
            far_keys, lists.blocks, lists.counts, keys[0], keys[0].stride()[:3], lists.index[0], lists.ranks[0],
            lists.index[0].shape[-1], turn.cos, turn.sin, *far, count, heads, tiles, few + room,
            CHUNK=lists.levels.chunk, LEVELS=lists.levels.top + 1, R=turn.pairs, STEP=STEP, BLOCK_N=entries,
            num_warps=4,
        )  # fmt: skip
    if room:
        tiles = room // entries
        gather_kernel[(tiles * count * heads,)](
            far_keys, far_values, bias, lists.blocks, lists.counts, tuple(keys), tuple(values), strides(keys),
            strides(values), lists.index, lists.ranks, tuple(part.shape[-1] for part in lists.index), biases(lists),
            turn.cos, turn.sin, *far, count, heads, tiles, few + room, few,
            TOP=lists.levels.top, D=dim, R=turn.pairs, STEP=STEP, BLOCK_N=entries, num_warps=8,
        )  # fmt: skip
    return far_keys, far_values, bias
