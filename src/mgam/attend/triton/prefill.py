"""Launches the reading of whole tiles: gathers what is not neighbours, allocates, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgam.attend.triton.lists import Lists
from mgam.attend.triton.tables import STEP, Turn, biases, copyable, described, precision, strides
from mgam.attend.triton.whole import gather_kernel, open_kernel, turn_kernel, whole_kernel
from mgam.kernels import at_once, cdiv
from mgam.merge import Part

FAR_BYTES = 1 << 30
"""Gathered keys and values kept at a time."""
OPEN_TILES, OPEN_WARPS = 8, 4
"""Tiles of opened chunks that one program turns, and its warps."""


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
    row_tiles = query_heads // heads * size // tiles.rows
    for piece in pieces(queries, lists, keys, values, turn, tiles):
        asked, told, part = queries[piece.some], out[piece.some], piece.lists
        blocks = asked.shape[0]
        whole_kernel[(row_tiles * blocks * heads,)](
            asked, told, lse[piece.some], part.blocks, part.counts, part.index[0], piece.bias, *piece.descriptors,
            turn.cos, turn.sin, *piece.far, scale, softcap or 1.0, blocks, heads, row_tiles, piece.few,
            part.index[0].shape[-1], piece.bias.shape[-1], piece.lowest, *asked.stride()[:3], *told.stride()[:3],
            G=query_heads // heads, Q=size, D=dim, BLOCK_M=tiles.rows, CAP=softcap is not None,
            PRECISION=precision(queries.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
            maxnreg=tiles.registers, **piece.constants,
        )  # fmt: skip
    return Part(out, lse)


@dataclass(frozen=True)
class Piece:
    """Some blocks of a call, with what lies before their windows gathered."""

    some: slice
    lists: Lists
    descriptors: tuple[TensorDescriptor, ...]
    """Keys of tokens from `lowest` on, values of tokens, gathered keys, gathered values of summaries."""
    bias: Tensor
    far: tuple[Tensor, Tensor]
    few: int
    """Gathered lines that opened chunks take."""
    lowest: int
    constants: dict[str, int | bool]


def pieces(
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    turn: Turn,
    tiles: WholeTiles,
) -> Iterator[Piece]:
    """Cuts a call so that what is gathered at a time is bounded."""
    count, query_heads, size, dim = queries.shape
    heads, entries = keys[0].shape[1], tiles.entries
    far = turn.far(keys[0].shape[2]) if turn.pairs else (turn.cos, turn.sin)
    opened = lists.index[0].shape[-1] * lists.levels.chunk
    few = opened if turn.pairs else 0
    room = cdiv(sum(part.shape[-1] for part in lists.index[1:]), entries) * entries
    each = heads * (few + 2 * room) * dim * queries.element_size()
    programs = query_heads * size // tiles.rows
    step = at_once(count, max(1, FAR_BYTES // each), programs, 2, queries.device) if each else count
    constants: dict[str, int | bool] = {
        "CHUNK": lists.levels.chunk, "TOP": lists.levels.top, "R": turn.pairs, "STEP": STEP, "BLOCK_N": entries,
        "OPENED": opened > 0, "SUMMARIES": room > 0,
    }  # fmt: skip
    value_desc = described(values[0], entries, dim)
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        part = lists[some] if step < count else lists
        far_keys, far_values, bias = _gathered(part, keys, values, turn, far, few, room, entries)
        placed, lowest = keys[0], 0
        if turn.pairs:
            assert part.where is not None
            lowest, highest = part.where.lowest, part.where.highest + size
            placed = _turned(keys[0], turn, far, entries, lowest, highest)
        key_desc = described(placed, entries, dim)
        gathered = (described(made, entries, dim) if made.numel() else key_desc for made in (far_keys, far_values))
        yield Piece(some, part, (key_desc, value_desc, *gathered), bias, far, few, lowest, constants)


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
        tiles = cdiv(few // entries, OPEN_TILES)
        open_kernel[(tiles * count * heads,)](
            far_keys, lists.blocks, lists.counts, keys[0], keys[0].stride()[:3], lists.index[0], lists.ranks[0],
            lists.index[0].shape[-1], turn.cos, turn.sin, *far, count, heads, tiles, few + room,
            CHUNK=lists.levels.chunk, LEVELS=lists.levels.top + 1, R=turn.pairs, STEP=STEP, BLOCK_N=entries,
            TILES=OPEN_TILES, num_warps=OPEN_WARPS,
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
