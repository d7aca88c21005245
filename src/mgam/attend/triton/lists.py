"""A cover as the kernels take it: index lists, counts and ranks on the device, without any wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgam.cover import Cover
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.positions import Positions
from mgam.schedule import Blocks


@dataclass(frozen=True)
class Lists:
    """What N blocks read, per KV head. Level 0 stands for the opened chunks, level l for summaries.

    Shapes: blocks (4, N) int64: row, start, length, window start; index[l] and ranks[l] (N, H, M_l) int64; counts
    (N, H, 1+L).
    """

    levels: Levels
    blocks: Tensor
    size: int
    """Queries per block, padding included."""
    index: tuple[Tensor, ...]
    counts: Tensor
    ranks: tuple[Tensor, ...]
    """Distance of each entry to the window (`Cover.ranks`); the index lists themselves where positions are absolute."""
    mass: float = 1.0
    even: int = 1
    """Tokens that divide where blocks and windows begin, and how long blocks are, as far as that is known."""
    where: Where | None = None
    """Where blocks and windows stand, as far as that is known without asking the device."""

    @classmethod
    def of(cls, cover: Cover, blocks: Blocks, device: torch.device, positions: Positions | None = None) -> Lists:
        """The lists of a cover; ranks are worked out only for granular positions."""
        there = blocks.on(device)
        granular = positions is not None and positions.kind == "granular"
        window = cover.window_start.to(device, torch.int64)
        table = _table(blocks, there, window)
        index = tuple(part.to(device).contiguous() for part in (cover.opened, *cover.summaries))
        if cover.placed is not None and cover.placed[0].device == device:
            counts, ranks = cover.placed
        else:
            counts, ranks = places(index, cover.levels, granular)
        return cls(cover.levels, table, blocks.size, index, counts, ranks, cover.mass, *_even(blocks, cover))

    def __getitem__(self, part: slice) -> Lists:
        index, ranks = (tuple(level[part] for level in levels) for levels in (self.index, self.ranks))
        where = None if self.where is None else Where.of(self.where.table[:, part], self.size, self.levels.chunk)
        blocks = self.blocks[:, part].contiguous()
        return replace(self, blocks=blocks, index=index, counts=self.counts[part], ranks=ranks, where=where)

    @property
    def bare(self) -> bool:
        """Whether nothing is read before the window."""
        return not any(part.shape[-1] for part in self.index)

    def near(self, blocks: Blocks) -> Lists:
        """The same lists for tokens that were brought together, a row for each block: opened chunks, then the window
        (`mgam.pyramid.Elsewhere`). Ranks stay as they were."""
        shape = self.index[0].shape

        def find() -> tuple[Tensor, Tensor]:
            device, chunk = self.blocks.device, self.levels.chunk
            _, start, length, window = self.blocks
            moved = shape[2] * chunk - window // chunk * chunk
            table = (torch.arange(shape[0], device=device), start + moved, length, window + moved)
            return torch.stack(table), torch.arange(shape[2], device=device).expand(shape).contiguous()

        table, local = blocks.once_with(("near", shape), self.blocks, find)
        return replace(self, blocks=table, index=(local, *self.index[1:]), even=1, where=None)

    def steps(self) -> list[int]:
        """Tokens from one index to the next, per level."""
        return [self.levels.chunk, *self.levels.sizes[1:]]


@dataclass(frozen=True)
class Where:
    """Where blocks and their windows stand."""

    table: Tensor
    """(2, N) on the CPU: start and window start of blocks."""
    lowest: int
    """First token of any window."""
    highest: int
    """First token of the last block."""
    touched: int
    """Chunks that a window and its block touch at most."""

    @classmethod
    def of(cls, table: Tensor, size: int, chunk: int) -> Where:
        """What follows for blocks of at most `size` tokens."""
        if not table.shape[1]:
            return cls(table, 0, 0, 0)
        start, window = table
        touched = int(((start + size - 1) // chunk - window // chunk).max()) + 1
        return cls(table, int(window.min()), int(start.max()), touched)


def _even(blocks: Blocks, cover: Cover) -> tuple[int, Where | None]:
    """What divides the starts of blocks and windows (1 where blocks are shorter than their room), and these; 1 and
    nothing where they are not known."""
    if cover.known is None:
        return 1, None
    begin = cover.known.start

    def find() -> tuple[int, Where]:
        full = bool((blocks.length == blocks.size).all())
        table = torch.stack((blocks.start, begin))
        where = Where.of(table, blocks.size, cover.levels.chunk)
        return math.gcd(blocks.size, *table.unique().tolist()) if full else 1, where

    return blocks.once_with(("even", cover.levels.chunk), begin, find)


def _table(blocks: Blocks, there: Blocks, window: Tensor) -> Tensor:
    """Row, start, length and window start (4, N) of blocks; layers whose windows are the same tensor share it."""
    return blocks.once_with(
        ("table", window.device), window, lambda: torch.stack((there.row, there.start, there.length, window))
    )


def places(index: Sequence[Tensor], levels: Levels, granular: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Counts (N, H, 1+L) of entries that are not padding, and ranks of the lists' shapes (the lists where not
    granular)."""
    count, heads = index[0].shape[:2]
    device = index[0].device
    widths = tuple(part.shape[-1] for part in index)
    ranks = tuple(torch.empty_like(part) for part in index) if granular else tuple(index)
    if not sum(widths) or not count:
        return torch.zeros(count, heads, len(index), dtype=torch.int32, device=device), ranks
    counts = torch.empty(count, heads, len(index), dtype=torch.int32, device=device)
    place_kernel[(count * heads, len(index))](
        tuple(index), ranks, counts, widths, (levels.chunk, *levels.sizes[1:]), LEVELS=len(index), CHUNK=levels.chunk,
        RANKS=granular, BLOCK=64, num_warps=2 if granular else 1,
    )  # fmt: skip
    return counts, ranks


@triton.jit
def _held(list_ptr, width, BLOCK: tl.constexpr):
    """Entries of a list that are not padding."""
    found = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, width, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        found += (tl.load(list_ptr + slot, mask=slot < width, other=-1) >= 0).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize_on_alignment=["count_ptr"])
def place_kernel(
    lists, ranks, count_ptr, widths, steps,
    LEVELS: tl.constexpr, CHUNK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts one list of one block and head, and ranks its entries among all lists (`Cover.ranks`)."""
    pair = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1)
    total = 0
    mine = 0
    for level in tl.static_range(LEVELS):
        if widths[level] > 0:  # noqa: SIM102  (tensors take no `and`)
            if RANKS or level == own:
                held = _held(lists[level] + pair * widths[level], widths[level], BLOCK)
                if level == own:
                    mine = held
                total += held * (CHUNK if level == 0 else 1)
    tl.store(count_ptr + pair * LEVELS + own, mine)
    if RANKS:
        for level in tl.static_range(LEVELS):
            if level == own:
                width = widths[level]
                for first in tl.range(0, mine, BLOCK):
                    slot = first + tl.arange(0, BLOCK)
                    start = tl.load(lists[level] + pair * width + slot, mask=slot < mine, other=0) * steps[level]
                    before = slot * (CHUNK if level == 0 else 1) - total
                    for near in tl.static_range(LEVELS):
                        if near != level and widths[near] > 0:
                            earlier = _earlier(lists[near] + pair * widths[near], widths[near], start, steps[near])
                            before += earlier * (CHUNK if near == 0 else 1)
                    tl.store(ranks[level] + pair * width + slot, before.to(tl.int64), mask=slot < mine)


@triton.jit
def _earlier(list_ptr, width, start, step):
    """How many of a sorted list's entries, `step` tokens apart, begin before tokens `start` (M,): by halving."""
    low = (start * 0).to(tl.int32)
    size = width + 0
    while size > 0:
        half = (size + 1) // 2
        place = low + half - 1
        index = tl.load(list_ptr + place, mask=place < width, other=-1)
        low = tl.where((index >= 0) & (index * step < start), low + half, low)
        size = size // 2
    return low


def check(lists: Lists, rows: int, tokens: int) -> None:
    """Refuses lists that a kernel would read wrongly. Waits for the device once.

    Raises:
        SettingError: naming every rule that is broken.
    """
    row, start, length, window = lists.blocks
    rules = {
        f"rows must be 0 ... {rows - 1}": ((row < 0) | (row >= rows)).any(),
        f"blocks must lie in the {tokens} tokens that the pyramid holds": (
            (start < 0) | (start + length > tokens)
        ).any(),
        f"blocks hold at most {lists.size} queries": ((length < 0) | (length > lists.size)).any(),
        "a window must start between 0 and its block": ((window < 0) | (window > start)).any(),
    }
    for number, (index, step) in enumerate(zip(lists.index, lists.steps(), strict=True)):
        if not index.shape[-1]:
            continue
        name = "opened chunks" if number == 0 else f"summaries of level {number}"
        late = ((index + 1) * step > window[:, None, None]) & (index >= 0)
        rules[f"{name} must lie before the window"] = late.any() | (index < -1).any()
        pairs = (index[..., 1:] >= 0) & (index[..., 1:] <= index[..., :-1])
        rules[f"{name} must be sorted, without repeats, with -1 only at the end"] = pairs.any()
    broken = torch.stack(list(rules.values())).tolist()
    if any(broken):
        raise SettingError("cover refused: " + "; ".join(rule for rule, bad in zip(rules, broken, strict=True) if bad))
