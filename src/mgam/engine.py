"""The engine: one call of one layer, from new queries to their attention over the pyramid.

Policies, attention and caches do not know one another; they meet here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgam import kernels
from mgam.attend import attend, watched
from mgam.attend.dispatch import serving
from mgam.cover import Cover, Known, dense_cover
from mgam.levels import Levels
from mgam.policies.base import ByPlace, Heard, Policy
from mgam.policies.scored import Scored
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Piece, Schedule
from mgam.segments import Segment, follow, padded

if TYPE_CHECKING:
    from mgam.policies.compact import CompactKeys
    from mgam.step import Stepped

CPU_ELEMENTS = 1 << 22
GPU_ELEMENTS = 1 << 27
KERNEL_ELEMENTS = 1 << 29
"""Elements of one gathered tensor at a time: bounds working memory whatever the length of a call. Kernels read in place
and take queries and votes as views where blocks are whole."""


@dataclass(frozen=True)
class Reading:
    """How a layer reads: everything that decides its result besides states and schedule."""

    policy: Policy
    levels: Levels = field(default_factory=Levels)
    positions: Positions = field(default_factory=Positions)
    dense_until: int = 0
    backend: str | None = None
    dense_prompt: bool = False
    """Whether the policy serves generation only: the spans before the last one of a schedule are read densely."""
    asking: Policy | None = None
    """The policy of questions and answers, where it is another one."""

    def policy_of(self, blocks: Blocks) -> Policy:
        """Who chooses for these blocks."""
        return self.asking if blocks.asking and self.asking is not None else self.policy


@dataclass(frozen=True)
class Stage:
    """What is read between two times at which tokens are forgotten."""

    groups: tuple[tuple[bool, Blocks], ...]
    begin: list[int]
    """Where the first block of each row was decided, among those that are not dense; -1 for a row without any."""
    read_to: list[int]
    """Where the last block of each row ends; 0 for a row without any."""

    @classmethod
    def of(cls, groups: Sequence[tuple[bool, Blocks]], rows: int) -> Stage:
        """The stage of these groups, of so many rows."""
        begin, read_to = [-1] * rows, [0] * rows
        for dense, blocks in groups:
            places = zip(blocks.row.tolist(), blocks.decide.tolist(), blocks.stop.tolist(), strict=True)
            for row, decide, stop in places:
                read_to[row] = max(read_to[row], stop)
                if not dense:
                    begin[row] = decide if begin[row] < 0 else min(begin[row], decide)
        return cls(tuple(groups), begin, read_to)


@dataclass(frozen=True)
class Plan:
    """What one call computes: groups of query blocks of like size, and where each row's new tokens stand.

    Shared by all layers of a model. `first[b]`: position of column 0 of the call in row b (negative under left
    padding); `before[b]`: tokens that row b held before the call.
    """

    groups: tuple[tuple[bool, Blocks], ...]
    first: Tensor
    before: Tensor
    columns: int
    dense_to: Tensor
    """Position up to which each row is read densely."""

    @classmethod
    def of(
        cls,
        schedules: Sequence[Schedule],
        before: Sequence[int],
        counts: Sequence[int],
        columns: int,
        dense_until: int,
        first: Sequence[int] | None = None,
        dense_prompt: bool = False,
    ) -> Plan:
        """Plans a call that adds `counts[b]` tokens to rows that hold `before[b]`, each row with its own schedule.

        Rows stand at the right of the call's columns unless `first` says otherwise. With `dense_prompt`, what comes
        before a schedule's last span is read densely.
        """
        sorted_pieces: dict[tuple[bool, bool, int], list[tuple[int, Piece]]] = defaultdict(list)
        dense_to = [max(dense_until, schedule.prompt if dense_prompt else 0) for schedule in schedules]
        for row, (schedule, old, new) in enumerate(zip(schedules, before, counts, strict=True)):
            for piece in schedule.pieces(old, old + new, dense_to[row]):
                size = piece.stop - piece.start
                votes = piece.vote_to - piece.vote_from
                asking = schedule.text is not None and piece.start >= schedule.text
                sorted_pieces[piece.dense, asking, max(size, votes).bit_length()].append((row, piece))
        groups = tuple((dense, Blocks.of(pieces, asking)) for (dense, asking, _), pieces in sorted_pieces.items())
        if first is None:
            first = [old + new - columns for old, new in zip(before, counts, strict=True)]
        places = (torch.tensor(list(numbers), dtype=torch.int64) for numbers in (first, before, dense_to))
        first_column, held, dense_end = places
        return cls(groups, first_column, held, columns, dense_end)

    def fills(self, queries: Tensor) -> bool:
        """Whether every column of a call (B, Hq, L, D) belongs to a block."""
        return self.held == queries.shape[0] * queries.shape[2]

    @cached_property
    def held(self) -> int:
        """Queries of all blocks."""
        return sum(int(blocks.length.sum()) for _, blocks in self.groups)

    @cached_property
    def newest(self) -> Blocks | None:
        """The blocks of a call in which each row has one new token that chooses for itself; None for any other call."""
        dense, blocks = self.groups[0] if len(self.groups) == 1 else (True, None)
        if dense or blocks is None or self.columns != 1 or blocks.size != 1 or blocks.votes != 1:
            return None
        return blocks if torch.equal(blocks.row, torch.arange(len(self.before))) else None

    @cached_property
    def at_once(self) -> list[Stage]:
        """First what is dense, then all the rest."""
        halves = [tuple(group for group in self.groups if group[0] == dense) for dense in (True, False)]
        return [Stage.of(groups, len(self.before)) for groups in halves if groups]

    @cached_property
    def by_block(self) -> list[Stage]:
        """First what is dense, then the n-th block of every row together."""
        found: dict[int, list[tuple[bool, Blocks]]] = defaultdict(list)
        rest = sorted(place for dense, blocks in self.groups if not dense for place in blocks.places())
        number: dict[tuple[int, int], int] = {}
        for _, places in groupby(rest, key=lambda place: place[0]):
            number |= {place: count for count, place in enumerate(places, start=1)}
        for dense, blocks in self.groups:
            stage = [0 if dense else number[place] for place in blocks.places()]
            for one in sorted(set(stage)):
                found[one].append((dense, blocks[torch.tensor([other == one for other in stage])]))
        return [Stage.of(found[one], len(self.before)) for one in sorted(found)]


@dataclass
class Record:
    """What reading cost and what it rested on. Filled while `watch` is set.

    Sums are kept where they were made, so that counting does not wait for the device.
    """

    queries: float = 0.0
    """Queries counted, summed over layers."""
    evidence_from: int | None = None
    """Queries from this position on have their attention to opened chunks recorded."""
    _entries: Tensor | None = None
    _mass: dict[int, Tensor] = field(default_factory=dict)

    @property
    def entries(self) -> list[float]:
        """Entries read per level, summed over queries and layers, averaged over KV heads."""
        return [] if self._entries is None else self._entries.tolist()

    @property
    def mass(self) -> dict[int, Tensor]:
        """Per layer: attention mass of each chunk of level 1, (H, C), of the queries from `evidence_from` on."""
        return {layer: mass.cpu() for layer, mass in self._mass.items()}

    def count(self, cover: Cover, blocks: Blocks, layer: int = 0) -> None:
        """Adds what a layer's blocks read."""
        found = cover.counted(blocks)
        self._entries = found if self._entries is None else self._entries.to(found.device) + found
        self.queries += float(blocks.length.sum())

    def shows(self, blocks: Blocks, cover: Cover) -> bool:
        """Whether the attention to opened chunks is wanted of any of these blocks."""
        from_here = self.evidence_from
        return from_here is not None and cover.opened.shape[-1] > 0 and int(blocks.start.max()) >= from_here

    def add(self, layer: int, blocks: Blocks, cover: Cover, mass: Tensor | None) -> None:
        """Adds what a layer's blocks read, and the attention mass (N, H, K) of opened chunks where it `shows`."""
        self.count(cover, blocks, layer)
        if mass is not None and self.evidence_from is not None and self.shows(blocks, cover):
            answering = blocks.on(mass.device).start >= self.evidence_from
            chunks = int(blocks.stop.max()) // cover.levels.chunk
            self.attribute(layer, cover, mass * answering[:, None, None], chunks)

    def attribute(self, layer: int, cover: Cover, mass: Tensor, chunks: int) -> None:
        """Adds the mass (N, H, K) of opened chunks, all of them before chunk `chunks`."""
        heads = cover.opened.shape[1]
        kept = self._mass.get(layer, mass.new_zeros(heads, 0, dtype=torch.float32))
        if chunks > kept.shape[1]:
            kept = torch.nn.functional.pad(kept, (0, chunks - kept.shape[1]))
        for index, block_mass in zip(cover.opened, mass.float(), strict=True):  # one by one: no chunk twice at a time
            kept.scatter_add_(1, index.clamp_min(0), block_mass * (index >= 0))
        self._mass[layer] = kept


def read(
    queries: Tensor,
    pyramid: Pyramid,
    plan: Plan,
    reading: Reading,
    scale: float,
    *,
    softcap: float | None = None,
    recent: Tensor | None = None,
    record: Record | None = None,
    layer: int = 0,
) -> Tensor:
    """Attention of a call's queries (B, Hq, L, D) over a pyramid that already holds the call's keys.

    Columns that belong to no row (padding) give zeros. `recent` (B, Hq, R, D) are the last queries of each row before
    the call, for votes of blocks that began there: at least `history(schedule)` of them, or all there were. A query
    that is not there does not vote.
    """
    showing = record is not None and record.evidence_from is not None
    stepped = _step(queries, pyramid, plan, reading, scale, softcap, showing)
    if stepped is not None:
        if record is not None:
            assert plan.newest is not None
            record.add(layer, plan.newest, stepped.cover, stepped.mass)
        return stepped.out
    ahead = _ahead(pyramid, plan, reading)
    try:
        return _read(queries, pyramid, plan, reading, scale, softcap, recent, record, layer)
    finally:
        for keys in ahead:
            keys.wait()


def _read(
    queries: Tensor,
    pyramid: Pyramid,
    plan: Plan,
    reading: Reading,
    scale: float,
    softcap: float | None,
    recent: Tensor | None,
    record: Record | None,
    layer: int,
) -> Tensor:
    """`read`, block by block."""
    observe, evict = getattr(reading.policy, "observe", None), getattr(reading.policy, "evict", None)
    if observe or evict:
        places = plan.first.tolist(), plan.before.tolist(), plan.dense_to.tolist()
        heard = Heard(queries.detach(), *places, reading.positions)
    if observe:
        with torch.no_grad():
            observe(heard, pyramid)
    out: Tensor | None = None
    stages = [Stage(plan.groups, [], [])]
    if evict:
        stages = plan.by_block if reading.policy.by_block else plan.at_once  # type: ignore[attr-defined]
    for stage in stages:
        if evict:
            with torch.no_grad():
                evict(heard, stage.begin, pyramid)
        for dense, blocks in stage.groups:
            for part in _segments(dense, blocks, plan, reading, pyramid, queries, softcap is not None):
                taken = part.take(queries)
                cover = _choose(taken, queries, recent, part, plan, pyramid, reading)
                there = part.blocks.moved(pyramid.gone)
                if out is None:
                    out = torch.empty_like(queries) if plan.fills(queries) else torch.zeros_like(queries)
                place = None if _learns(queries, pyramid) else part.place(out)
                given = taken, there, cover, pyramid, reading.positions, scale, softcap, reading.backend
                mass = None
                if record is not None and record.shows(there, cover):
                    got, mass = watched(*given)
                else:
                    got = attend(*given, place)
                if got is not place:
                    part.put(out, got)
                if record is not None:
                    record.add(layer, there, cover, mass)
        if evict:
            with torch.no_grad():
                reading.policy.count(heard, stage.read_to, pyramid)  # type: ignore[attr-defined]
    return torch.zeros_like(queries) if out is None else out


def _ahead(pyramid: Pyramid, plan: Plan, reading: Reading) -> list[CompactKeys]:
    """What is made beside the first blocks of a call for those after them."""
    if hasattr(reading.policy, "evict") or any(pyramid.gone):
        return []
    found = []
    with torch.no_grad():
        for dense, blocks in plan.groups:
            policy = reading.policy_of(blocks)
            keys = policy.ahead(blocks, pyramid, reading.levels) if isinstance(policy, Scored) and not dense else None
            found += [] if keys is None else [keys]
    return found


@cache
def _stepping() -> ModuleType:
    """`mgam.step`, which needs Triton."""
    from mgam import step

    return step


def _step(
    queries: Tensor, pyramid: Pyramid, plan: Plan, reading: Reading, scale: float, softcap: float | None, watched: bool
) -> Stepped | None:
    """One new token per row that is found and read by kernels alone; None for other calls."""
    blocks = plan.newest
    policy = None if blocks is None else reading.policy_of(blocks)
    if blocks is None or not isinstance(policy, Scored) or any(pyramid.gone) or _learns(queries, pyramid):
        return None
    if not pyramid.in_memory or not kernels.serve(pyramid.keys[0]):
        return None
    if serving(queries, pyramid, reading.backend) != "triton":
        return None
    levels, dtype = pyramid.levels, pyramid.keys[0].dtype
    if policy.budget < levels.chunk or queries.dtype != dtype or levels != reading.levels:
        return None
    if hasattr(reading.policy, "observe") or hasattr(reading.policy, "evict"):
        return None
    step = _stepping()
    now = step.moment(blocks, policy, pyramid)
    if now is None:
        return None
    return step.read(queries, now, pyramid, policy, reading.positions, scale, softcap, watched)


def _learns(queries: Tensor, pyramid: Pyramid) -> bool:
    """Whether gradients are wanted of anything that is read."""
    if not torch.is_grad_enabled():
        return False
    states = (*pyramid.keys, *pyramid.values) if pyramid.in_memory else ()
    return any(part.requires_grad for part in (queries, *states))


def history(schedule: Schedule, position: int = 0) -> int:
    """Queries that must be kept from call to call so that blocks from `position` on can vote.

    A block with `lookahead="block"` needs them when a call cuts it.
    """
    blocks = [span.block for span in schedule.spans if span.block > 1 and (span.stop is None or span.stop > position)]
    return 2 * max(blocks, default=0)


def _choose(
    taken: Tensor,
    queries: Tensor,
    recent: Tensor | None,
    part: Segment,
    plan: Plan,
    pyramid: Pyramid,
    reading: Reading,
) -> Cover:
    blocks, heads, levels = part.blocks, pyramid.keys[0].shape[1], reading.levels
    with torch.no_grad():
        if part.dense:
            key = ("dense", heads, levels, queries.device)
            return blocks.once(key, lambda: dense_cover(blocks, heads, levels, queries.device))
        policy, there = reading.policy_of(blocks), blocks.moved(pyramid.gone)
        if policy.votes:
            voters = part.voters(taken.detach(), queries.detach(), recent, plan.before)
            return policy.choose(voters, there, pyramid, levels)
        if not (isinstance(policy, ByPlace) and policy.by_place):
            return policy.choose(None, there, pyramid, levels)

        def find() -> Cover:
            cover = policy.choose(None, there, pyramid, levels)
            return replace(cover, known=Known(cover.begin, cover.most))

        return there.once(("cover", policy, heads, levels, queries.device), find)


def _segments(
    dense: bool, blocks: Blocks, plan: Plan, reading: Reading, pyramid: Pyramid, queries: Tensor, written: bool
) -> list[Segment]:
    """Cuts a group so that no working tensor grows with the call. `written`: logits are written out, head by head."""
    device = queries.device
    per_head = not dense and bool(getattr(reading.policy_of(blocks), "per_head", False))
    heads = queries.shape[1] if per_head else pyramid.keys[0].shape[1]
    by_kernels = serving(queries, pyramid, reading.backend) == "triton"
    in_place = by_kernels and pyramid.in_memory
    compiled, policy = by_kernels and _compiled(queries), reading.policy_of(blocks)
    sized = blocks.once("padded", lambda: padded(blocks)) if compiled else blocks
    early = policy.early(sized) if compiled and isinstance(policy, Scored) and not dense else 0

    tokens = sized.once("tokens", lambda: int(sized.stop.max()) if len(sized) else 0)
    if in_place:
        per_block = _kernel_elements(sized, tokens, reading, heads, queries)
        limit = KERNEL_ELEMENTS if queries.is_cuda else CPU_ELEMENTS
    else:
        per_block = _elements(dense, sized, tokens, reading, heads, queries, written)
        limit = GPU_ELEMENTS if queries.is_cuda else CPU_ELEMENTS
    step = max(1, limit // max(per_block, 1))

    def cut() -> list[Segment]:
        # The early ones are read while the keys of the rest are made.
        some = [sized[:early], sized[early:]] if early else [sized]
        parts = [part for blocks in some for part in _evenly(blocks, step)]
        return [Segment.of(dense, part, plan.first, plan.before, plan.columns, device) for part in parts]

    return sized.once(("segments", step, early, device), cut)


def _evenly(blocks: Blocks, most: int) -> list[Blocks]:
    """Blocks in parts of like size, at most so many in each."""
    each = -(-len(blocks) // max(1, -(-len(blocks) // most)))
    return [blocks[first : first + each] for first in range(0, len(blocks), max(1, each))]


def _compiled(queries: Tensor) -> bool:
    """Whether kernels are compiled for these queries, not interpreted."""
    return queries.is_cuda


def _elements(
    dense: bool, blocks: Blocks, tokens: int, reading: Reading, heads: int, queries: Tensor, written: bool
) -> int:
    """Elements that gathering one block's covers, one for each of `heads`, and attending to them, takes at most."""
    query_heads, dim = queries.shape[1], queries.shape[3]
    if dense:
        return blocks.size * tokens * (query_heads if written else 1)
    window = (
        blocks.size
        + int((blocks.start - blocks.decide).max())
        + getattr(reading.policy, "window", tokens)
        + reading.levels.chunk
    )
    entries = reading.policy_of(blocks).read_at_most(tokens, reading.levels) + window
    voting = query_heads * blocks.votes * (tokens // reading.levels.chunk) // 4 if reading.policy.votes else 0
    choosing = 8 * heads * (tokens // reading.levels.chunk)
    size = blocks.size * (query_heads // heads if written else 1)
    return max(min(entries, tokens) * heads * max(dim, size), voting, choosing)


def _kernel_elements(blocks: Blocks, tokens: int, reading: Reading, heads: int, queries: Tensor) -> int:
    """Elements that one block takes at most where kernels read in place: scores and lists; and queries, votes and
    result, unless all of these are views."""
    states = 4 * queries.shape[1] * max(blocks.size, blocks.votes) * queries.shape[3]
    if blocks.once("views", lambda: follow(blocks) and torch.equal(blocks.vote_from, blocks.start)):
        states = 0
    return states + 8 * heads * (tokens // reading.levels.chunk)
