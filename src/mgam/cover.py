"""The cover: for each query block and KV head, which entries are read, each at which level."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgam.levels import Levels
from mgam.schedule import Blocks, sent


@dataclass(frozen=True)
class Known:
    """What the maker of a cover knows of it beforehand, so that nobody need wait for the device to say it.

    Whoever gives this vouches for lists that are sorted, in range, and before the window.
    """

    start: Tensor
    """(N,) on the CPU: first token of each window."""
    entries: int
    """Most entries before a window."""


@dataclass(frozen=True)
class Cover:
    """What N query blocks read, per KV head; every query also reads the tokens from its block's window start to itself.

    Index lists are sorted, hold no index twice, and end in -1 where a block reads fewer than others. All entries lie
    before the window start, so every query of the block may read them.

    Shapes (N blocks; H: the KV heads, or the query heads where each of them chooses for itself):
        window_start: (N,), first token of the window; 0 with no entries is dense attention
        opened: (N, H, K), chunks of level 1 read token by token
        summaries[l-1]: (N, H, M_l), chunks of level l read as one entry each
    """

    levels: Levels
    window_start: Tensor
    opened: Tensor
    summaries: tuple[Tensor, ...]
    mass: float = 1.0
    """How far a summary counts for its tokens: a bias `mass * log n` on its logit. 1: as often as it has tokens."""
    known: Known | None = None
    placed: tuple[Tensor, tuple[Tensor, ...]] | None = None
    """Counts (N, H, 1+L) int32 of the lists' entries and their ranks (as `ranks` has them, int64, in the lists'
    shapes), where the maker has worked them out."""
    _sums: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.summaries) != self.levels.top:
            raise ValueError(f"{len(self.summaries)} lists of summaries for {self.levels.top} levels of chunks")

    def __getitem__(self, part: slice) -> Cover:
        return Cover(
            self.levels,
            self.window_start[part],
            self.opened[part],
            tuple(index[part] for index in self.summaries),
            self.mass,
            None if self.known is None else Known(self.known.start[part], self.known.entries),
            None if self.placed is None else (self.placed[0][part], tuple(ranks[part] for ranks in self.placed[1])),
        )

    @property
    def begin(self) -> Tensor:
        """First token of each window (N,), on the CPU."""
        return self.window_start.cpu() if self.known is None else self.known.start

    def reach(self, blocks: Blocks) -> int:
        """Most tokens from the start of a window that does not begin with the text to the end of its block."""
        begin = self.begin

        def find() -> int:
            return int((blocks.stop.cpu() - begin).masked_fill(begin == 0, 0).max()) if len(begin) else 0

        return find() if self.known is None else blocks.once_with("reach", begin, find)

    @property
    def is_dense(self) -> bool:
        """Whether every query reads its whole past as tokens."""
        return not self.width and not bool(self.begin.any())

    @property
    def most(self) -> int:
        """Most entries before a window, or a bound of them where that is known without asking the device."""
        if self.known is not None:
            return self.known.entries
        return int(self.entries().max()) if self.width and len(self.window_start) else 0

    @property
    def width(self) -> int:
        """Most entries before the window that any block may hold, padding included."""
        return self.opened.shape[-1] * self.levels.chunk + sum(index.shape[-1] for index in self.summaries)

    def entries(self) -> Tensor:
        """Entries before the window (N, H), without padding."""
        count = (self.opened >= 0).sum(-1) * self.levels.chunk
        for index in self.summaries:
            count = count + (index >= 0).sum(-1)
        return count

    def entries_per_level(self, blocks: Blocks) -> list[float]:
        """Entries read at each level, summed over queries and averaged over KV heads; the window counts at level 0.

        This is also the number that FLOP and byte counts start from.
        """
        return list(self.counted(blocks).tolist())

    def counted(self, blocks: Blocks) -> Tensor:
        """The same (1+L,), in float64 on the cover's device: nothing waits for it, and it is found once."""
        kept = self._sums.get("blocks")  # blocks may hold this cover: to hold them too would close a ring
        if kept is None or kept() is not blocks:
            self._sums.update(blocks=weakref.ref(blocks), counted=self._counted(blocks))
        counted: Tensor = self._sums["counted"]
        return counted

    def _counted(self, blocks: Blocks) -> Tensor:
        if self.placed is not None and self.known is not None:
            length, weight, near = self._near(blocks, self.placed[0].device)
            return torch.addcmul(near, length @ self.placed[0].double().mean(1), weight)
        there = blocks.on(self.opened.device)
        queries = there.length.double()
        window = queries * (there.start - self.window_start) + queries * (queries + 1) / 2
        found = [((self.opened >= 0).sum(-1).double().mean(-1) * self.levels.chunk * queries + window).sum()]
        found += [((index >= 0).sum(-1).double().mean(-1) * queries).sum() for index in self.summaries]
        return torch.stack(found)

    def _near(self, blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of each block (N,), tokens of an entry of each list (1+L,), and what is read in windows (1+L,), in
        float64; found once for layers whose windows are the same tensor."""
        assert self.known is not None
        begin = self.known.start

        def find() -> Tensor:
            length = blocks.length.double().cpu()
            window = length * (blocks.start.cpu() - begin) + length * (length + 1) / 2
            rest = [0.0] * self.levels.top
            table = torch.tensor([self.levels.chunk, *[1.0] * self.levels.top, float(window.sum()), *rest]).double()
            return sent(torch.cat((table, length)), device)

        found = blocks.once_with(("near", device), begin, find)
        weight, near, queries = found.split((1 + self.levels.top, 1 + self.levels.top, len(blocks)))
        return queries, weight, near

    def ranks(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Distance of every entry to the window in its cover, in entries, as numbers -n ... -1.

        Returns the distance of the first token of each opened chunk (N, H, K) and of each summary (N, H, M_l). Where an
        index is -1 the number means nothing.
        """
        sizes = (self.levels.chunk, *self.levels.sizes[1:])
        lists = (self.opened, *self.summaries)
        weights = (self.levels.chunk, *([1] * self.levels.top))
        far = torch.iinfo(torch.int64).max
        starts = [torch.where(index < 0, far, index * size) for index, size in zip(lists, sizes, strict=True)]
        total = self.entries()[..., None]
        placed = []
        for start in starts:
            before = torch.zeros_like(start)
            for other, weight in zip(starts, weights, strict=True):
                if other.shape[-1]:
                    before = before + weight * torch.searchsorted(other.contiguous(), start.contiguous())
            placed.append(before - total)
        return placed[0], tuple(placed[1:])


def window_start(decide: Tensor, window: int, levels: Levels) -> Tensor:
    """First token, on a chunk border, of the windows of blocks decided at `decide` (N,): at least `window` tokens."""
    return (decide - window + 1).clamp_min(0) // levels.chunk * levels.chunk


def windows(blocks: Blocks, window: int, levels: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    """`window_start` of blocks (N,), on the CPU and on a device; moved there once for all layers."""
    start = blocks.once(("window", window, levels), lambda: window_start(blocks.decide, window, levels))
    return start, blocks.once(("window", window, levels, device), lambda: sent(start, device))


def dense_cover(blocks: Blocks, heads: int, levels: Levels, device: torch.device) -> Cover:
    """Every past token at level 0."""
    none = torch.empty(len(blocks), heads, 0, dtype=torch.int64, device=device)
    start = torch.zeros(len(blocks), dtype=torch.int64)
    return Cover(levels, start.to(device), none, (none,) * levels.top, known=Known(start, 0))


def refine(
    opened: Tensor, start: Tensor, levels: Levels, *, keep: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """Summaries that complete a partition: everything before the window that is not opened, as coarse as it can be.

    A chunk is split when something in it is opened, when it reaches into the window, when it is the first, or when
    `keep` says so.

    Args:
        opened: (N, H, C) bool, chunks of level 1 that are read as tokens.
        start: (N,) first token of the window, a multiple of the chunk size.
        keep: per level 2 and up, (N, H, C_l) bool of chunks to split besides.

    Returns:
        Per level 1 and up, (N, H, C_l) bool of summaries that are read.
    """
    blocks, heads, chunks = opened.shape
    ends = start[:, None, None]
    split = [opened]
    complete = [_complete(chunks, levels.sizes[1], ends)]
    for level in range(2, levels.top + 1):
        ratio, size = levels.ratio(level), levels.sizes[level]
        count = -(-split[-1].shape[-1] // ratio)
        children = torch.nn.functional.pad(split[-1], (0, count * ratio - split[-1].shape[-1]))
        parent = children.view(blocks, heads, count, ratio).any(-1)
        whole = _complete(count, size, ends)
        parent = parent | ~whole
        if count:
            parent[..., 0] = True
        besides = keep[level - 2] if keep is not None else None
        if besides is not None:
            parent = parent | besides
        split.append(parent)
        complete.append(whole)
    read = []
    for level in range(1, levels.top + 1):
        here = complete[level - 1] & ~split[level - 1]
        if level < levels.top:
            above = split[level].repeat_interleave(levels.ratio(level + 1), -1)[..., : here.shape[-1]]
            here = here & above
        read.append(here)
    return tuple(read)


def _complete(count: int, size: int, start: Tensor) -> Tensor:
    """(N, 1, count) bool: chunks that end before the window."""
    return (torch.arange(1, count + 1, device=start.device) * size)[None, None] <= start


def indices(mask: Tensor, most: int | None = None) -> Tensor:
    """Sorted positions of True along the last axis, (..., M), ended by -1.

    `most` gives M when the caller knows a bound; else M is the largest count (which waits for the device).
    """
    if mask.shape[-1] == 0:
        return torch.empty(*mask.shape[:-1], 0, dtype=torch.int64, device=mask.device)
    place = mask.cumsum(-1) - 1
    most = int(place[..., -1].max()) + 1 if most is None else most
    found = torch.full((*mask.shape[:-1], most + 1), -1, dtype=torch.int64, device=mask.device)
    number = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    found.scatter_(-1, torch.where(mask, place, most), number)
    return found[..., :most].contiguous()


def cover_of(
    opened: Tensor,
    start: Tensor,
    levels: Levels,
    *,
    rest: str = "summaries",
    mass: float = 1.0,
    keep: Sequence[Tensor | None] | None = None,
    most: int | None = None,
    sink: bool = True,
) -> Cover:
    """A cover that opens the chunks in `opened` (N, H, C) bool and reads the rest as summaries, or drops it.

    The first chunk (the sink) is always opened unless `sink` is off; chunks that reach into the window are read there.
    A policy whose choice depends on queries says how many chunks it opens at `most`, sink included: the shape of the
    cover, and with it the order of sums, must not depend on what later blocks chose.
    """
    if opened.shape[-1]:
        opened = opened & _complete(opened.shape[-1], levels.chunk, start[:, None, None])
        if sink:
            opened[..., 0] = start[:, None] > 0
    chosen = indices(opened, None if most is None else min(most, opened.shape[-1]))
    if rest == "drop":
        none = torch.empty(*opened.shape[:2], 0, dtype=torch.int64, device=opened.device)
        return Cover(levels, start, chosen, (none,) * levels.top, mass)
    summaries = refine(opened, start, levels, keep=keep)
    more = 0 if sink else 2  # the first of each level is split also where the sink is not opened; all in it is read
    limits = [None] * levels.top if most is None else summaries_at_most(opened.shape[-1], most + more, levels)
    found = tuple(indices(read, limit) for read, limit in zip(summaries, limits, strict=True))
    return Cover(levels, start, chosen, found, mass)


def summaries_at_most(chunks: int, opened: int, levels: Levels) -> list[int]:
    """Bounds of what `refine` returns, per level 1 and up, when at most `opened` of `chunks` chunks are opened.

    A chunk that is split holds one that is opened, or the border of the window; all its children but one may be read.
    """
    limits = []
    for level in range(1, levels.top + 1):
        count = chunks * levels.chunk // levels.sizes[level]
        if level < levels.top:
            above = -(-chunks * levels.chunk // levels.sizes[level + 1])
            count = min(count, min(above, opened + 1) * (levels.ratio(level + 1) - 1))
        limits.append(count)
    return limits
