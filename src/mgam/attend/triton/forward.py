"""Launches the read kernel: chooses tiles by shape, allocates results, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgam.attend.triton.lists import Lists
from mgam.attend.triton.read import merge_kernel, read_kernel
from mgam.attend.triton.turn import place_keys_kernel, turn_kernel
from mgam.merge import Part
from mgam.positions import Positions, Rotary

READY_BYTES = 1 << 29
"""Rotated keys kept at a time."""
STEP = 64
"""Tokens whose turns are read from a table; a true position is a number of these steps and what is left."""


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
    ready: bool = False
    """Whether keys before the window are rotated once, into a buffer, rather than by every tile of rows."""
    shift: bool = False
    """Whether opened chunks, rotated by their true positions, are turned to their ranks by each tile of rows: one angle
    a chunk."""


@dataclass(frozen=True)
class Turn:
    """Rotary tables for a launch; `pairs` 0 means that nothing is rotated."""

    cos: Tensor
    sin: Tensor
    pairs: int
    anchor: int
    rotary: Rotary | None = None

    @classmethod
    def of(
        cls, positions: Positions, lists: Lists, tokens: int, device: torch.device, dtype: torch.dtype = torch.float16
    ) -> Turn:
        """Tables that reach every rank; dense attention takes true positions and so needs `tokens` of them.

        Angles are worked out in float32 at least; for half-precision keys the tables are then kept in float16, whose
        error is an eighth of what rounding a rotated bfloat16 key costs, and which halves what each tile loads.
        """
        if positions.kind != "granular":
            none = torch.empty(1, dtype=torch.float32, device=device)
            return cls(none, none, 0, 0)
        assert positions.rotary is not None
        limit = max(tokens, positions.rotary.limit) if lists.bare else positions.rotary.limit
        if dtype == torch.float32:
            cos, sin = positions.rotary.table(device, dtype, limit)
        else:
            cos, sin = positions.rotary.half_table(device, limit)
        return cls(cos, sin, cos.shape[-1], positions.anchor, positions.rotary)

    @property
    def composes(self) -> bool:
        """Whether keys may be turned to true positions first and to their ranks after."""
        whole = self.pairs > 0 and self.pairs & (self.pairs - 1) == 0 and self.cos.shape[0] >= STEP
        return whole and self.rotary is not None and self.rotary.compose(self.cos.device)

    def far(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Turns by whole steps that reach the last of `tokens`."""
        assert self.rotary is not None
        return self.rotary.turns(self.cos.device, STEP, tokens // STEP + 1)


def tiles_for(rows: int, dim: int, turned: bool, entries: int, programs: int) -> Tiles:
    """Tile shapes for blocks of `rows` rows (heads of a group x queries), found on an H100."""
    if rows <= 32:
        splits = max(1, min(entries // 256, 64, 512 // max(programs, 1)))
        splits = 1 << (splits.bit_length() - 1)  # a kernel is compiled for each number of splits
        return Tiles(16 if rows <= 16 else 32, 64, 4, 3, splits)
    if dim > 128:
        return Tiles(64, 32 if turned else 64, 4, 2)
    if rows <= 64:
        return Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8, 2, registers=128, ready=turned)


def read(
    queries: Tensor,
    lists: Lists,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    *,
    turn: Turn,
    softcap: float | None = None,
    tiles: Tiles | None = None,
    out: Tensor | None = None,
    near: Tensor | None = None,
) -> Part:
    """One softmax over each block's cover, without any wait for the device.

    Shapes: queries (N, H*G, Q, D), rows beyond a block's length give zeros; keys[l], values[l] (B, H, n_l, D) with
    any strides
    but the last; out like queries (written where `out` says, if given, by its strides), lse (N, H*G, Q) float32,
    -inf where nothing may be read.
    """
    count, query_heads, size, dim = queries.shape
    heads = keys[0].shape[1]
    group = query_heads // heads
    top = lists.levels.top
    room = sum(part.shape[-1] * (lists.levels.chunk if level == 0 else 1) for level, part in enumerate(lists.index))
    if tiles is None:
        tiles = tiles_for(group * size, dim, turn.pairs > 0, room + 1024, count * heads)
    if out is None:
        out = torch.empty_like(queries)  # where queries are a view of a call, so is the result
    lse = torch.empty(count, query_heads, size, dtype=torch.float32, device=queries.device)
    if not out.numel():
        return Part(out, lse)
    copies = tiles.copies and turn.pairs * 2 in (0, dim) and copyable(keys[0]) and copyable(values[0])
    ready = tiles.ready and copies and 2 * turn.pairs == dim and not lists.bare and turn.composes
    shift = ready and tiles.shift and lists.levels.chunk % tiles.entries == 0
    offsets, extent = _extents(lists, tiles.entries, lowest=int(shift))
    step = max(1, READY_BYTES // (heads * extent * dim * queries.element_size())) if ready else count
    if ready and near is None:
        near = _by_place(keys[0], turn, tiles.entries)
    if step < count:
        for first in range(0, count, step):
            some = slice(first, min(first + step, count))
            part = read(
                queries[some], lists[some], keys, values, scale, turn=turn, softcap=softcap, tiles=tiles, out=out[some],
                near=near,
            )  # fmt: skip
            lse[some] = part.lse
        return Part(out, lse)
    part_out, part_lse = out[None], lse
    if tiles.splits > 1:
        part_out = torch.empty(tiles.splits, *out.shape, dtype=torch.float32, device=out.device)
        part_lse = torch.empty(tiles.splits, *lse.shape, dtype=torch.float32, device=out.device)
    row_tiles = triton.cdiv(group * size, tiles.rows)
    rest = dim - 2 * turn.pairs
    key_desc, value_desc, ready_desc = keys[0], values[0], keys[0]
    near_desc, far, share = keys[0], (turn.cos, turn.sin), 1.0
    if ready:
        assert turn.rotary is not None
        assert near is not None
        far, share = turn.far(keys[0].shape[2]), turn.rotary.length**-2
        near_desc = described(near, tiles.entries, turn.pairs)
        buffer = torch.empty(count, heads, max(extent, tiles.entries), dim, dtype=queries.dtype, device=queries.device)
        turn_kernel[(extent // tiles.entries * count * heads,)](
            buffer, lists.blocks, lists.counts, tuple(keys), strides(keys), lists.index, lists.ranks,
            tuple(part.shape[-1] for part in lists.index), offsets, turn.cos, turn.sin, turn.cos.shape[0] - 1,
            turn.anchor, heads,
            extent // tiles.entries, extent,
            CHUNK=lists.levels.chunk, TOP=top, D=dim, R=turn.pairs, BLOCK_N=tiles.entries, LOWEST=int(shift),
            num_warps=4,
        )  # fmt: skip
        ready_desc = described(buffer, tiles.entries, turn.pairs)
    if copies:
        key_desc = described(keys[0], tiles.entries, block(turn.pairs or dim))
        value_desc = described(values[0], tiles.entries, block(dim))
    read_kernel[(row_tiles * count * heads, tiles.splits)](
        queries, part_out, part_lse, lists.blocks, lists.counts, key_desc, value_desc, ready_desc, near_desc,
        offsets, tuple(keys), tuple(values), strides(keys), strides(values),
        lists.index, lists.ranks, tuple(part.shape[-1] for part in lists.index),
        turn.cos, turn.sin, *far, share, turn.cos.shape[0] - 1, turn.anchor, scale, softcap or 1.0, biases(lists),
        count, heads, row_tiles, queries.stride(0), queries.stride(1), queries.stride(2), *part_out.stride()[:4],
        G=group, Q=size, CHUNK=lists.levels.chunk, TOP=top, D=dim, R=turn.pairs,
        BLOCK_M=tiles.rows, BLOCK_N=tiles.entries, BLOCK_D=block(dim), BLOCK_R=block(turn.pairs), BLOCK_P=block(rest),
        CAP=softcap is not None, BARE=lists.bare, SPLITS=tiles.splits, PRECISION=precision(queries.dtype),
        COPY=copies, READY=ready, SHIFT=shift, STEP=STEP,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    if tiles.splits > 1:
        merged = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        lines = count * query_heads * size
        merge_kernel[(lines,)](
            part_out, part_lse, merged, lse, lines, D=dim, BLOCK_D=block(dim), SPLITS=tiles.splits,
            BLOCK_S=triton.next_power_of_2(tiles.splits), num_warps=4 if tiles.splits > 8 else 1,
        )  # fmt: skip
        if merged is not out:
            out.copy_(merged)
    return Part(out, lse)


def _by_place(keys: Tensor, turn: Turn, entries: int) -> Tensor:
    """Keys (B, H, n, D) rotated by their true positions, in whole tiles."""
    batch, heads, tokens, dim = keys.shape
    room = triton.cdiv(tokens, entries) * entries
    placed = torch.empty(batch, heads, room, dim, dtype=keys.dtype, device=keys.device)
    place_keys_kernel[(room // entries, batch * heads)](
        placed, keys, keys.stride()[:3], turn.cos, turn.sin, *turn.far(tokens), heads, tokens, room,
        R=turn.pairs, STEP=STEP, BLOCK_N=entries, num_warps=4,
    )  # fmt: skip
    return placed


def _extents(lists: Lists, entries: int, lowest: int = 0) -> tuple[tuple[int, ...], int]:
    """Where each list from level `lowest` on begins in a buffer of rotated keys, and the buffer's length: whole
    tiles."""
    offsets, end = [], 0
    for level, part in enumerate(lists.index):
        offsets.append(end)
        if level < lowest:
            continue
        end += triton.cdiv(part.shape[-1] * (lists.levels.chunk if level == 0 else 1), entries) * entries
    return tuple(offsets), end


def copyable(states: Tensor) -> bool:
    """Whether the copy engine can take tiles of these states (B, H, n, D)."""
    if states.is_cuda and torch.cuda.get_device_capability(states.device) < (9, 0):
        return False
    step = states.element_size()
    aligned = all(stride * step % 16 == 0 for stride in states.stride()[:3])
    return aligned and states.data_ptr() % 16 == 0 and states.stride(3) == 1 and states.numel() > 0


def described(states: Tensor, entries: int, columns: int) -> TensorDescriptor:
    """Tiles of `entries` neighbours of one row and head, `columns` wide."""
    return TensorDescriptor(states, list(states.shape), list(states.stride()), [1, 1, entries, columns])


def strides(states: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Steps of rows, heads and entries, per level."""
    return tuple((level.stride(0), level.stride(1), level.stride(2)) for level in states)


def biases(lists: Lists) -> tuple[float, ...]:
    """Log mass of an entry in base 2, per level."""
    return tuple(lists.mass * math.log2(size) for size in lists.levels.sizes)


def block(width: int) -> int:
    """Columns of a tile that holds `width` of them: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """How products are taken: exactly for float32, which only tests use."""
    return "ieee" if dtype == torch.float32 else "tf32"
