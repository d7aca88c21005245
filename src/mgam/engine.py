"""The engine: one call of one layer, from new queries to their attention over the pyramid.

Policies, attention and caches do not know one another; they meet here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from mgam.attend import attend, blockwise
from mgam.cover import Cover, dense_cover
from mgam.levels import Levels
from mgam.policies.base import Heard, Policy, Voters
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, Piece, Schedule

CPU_ELEMENTS = 1 << 22
GPU_ELEMENTS = 1 << 27
"""Elements of one gathered tensor at a time: bounds working memory whatever the length of a call."""


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
        sorted_pieces: dict[tuple[bool, int], list[tuple[int, Piece]]] = defaultdict(list)
        dense_to = [max(dense_until, schedule.prompt if dense_prompt else 0) for schedule in schedules]
        for row, (schedule, old, new) in enumerate(zip(schedules, before, counts, strict=True)):
            for piece in schedule.pieces(old, old + new, dense_to[row]):
                size = piece.stop - piece.start
                votes = piece.vote_to - piece.vote_from
                sorted_pieces[piece.dense, max(size, votes).bit_length()].append((row, piece))
        groups = tuple((dense, Blocks.of(pieces)) for (dense, _), pieces in sorted_pieces.items())
        if first is None:
            first = [old + new - columns for old, new in zip(before, counts, strict=True)]
        places = (torch.tensor(list(numbers), dtype=torch.int64) for numbers in (first, before, dense_to))
        first_column, held, dense_end = places
        return cls(groups, first_column, held, columns, dense_end)

    def begin(self, groups: Sequence[tuple[bool, Blocks]]) -> list[int]:
        """Where the first block of each row was decided, among those that are not dense; -1 for a row without any."""
        found = [-1] * len(self.before)
        for dense, blocks in groups:
            for row, decide in zip(blocks.row.tolist(), blocks.decide.tolist(), strict=True) if not dense else ():
                found[row] = decide if found[row] < 0 else min(found[row], decide)
        return found

    def read_to(self, groups: Sequence[tuple[bool, Blocks]]) -> list[int]:
        """Where the last block of each row ends; 0 for a row without any."""
        found = [0] * len(self.before)
        for _, blocks in groups:
            for row, stop in zip(blocks.row.tolist(), blocks.stop.tolist(), strict=True):
                found[row] = max(found[row], stop)
        return found

    def stages(self, by_block: bool) -> list[tuple[tuple[bool, Blocks], ...]]:
        """The groups in the order in which they must be read when tokens are forgotten in between.

        First what is dense, then the rest: at once, or the n-th block of every row together.
        """
        found: dict[int, list[tuple[bool, Blocks]]] = defaultdict(list)
        rest = sorted(place for dense, blocks in self.groups if not dense for place in blocks.places())
        number: dict[tuple[int, int], int] = {}
        for _, places in groupby(rest, key=lambda place: place[0]):
            number |= {place: count for count, place in enumerate(places, start=1)}
        for dense, blocks in self.groups:
            stage = [0 if dense else number[place] if by_block else 1 for place in blocks.places()]
            for one in sorted(set(stage)):
                found[one].append((dense, blocks[torch.tensor([other == one for other in stage])]))
        return [tuple(found[one]) for one in sorted(found)]


@dataclass
class Record:
    """What reading cost and what it rested on. Filled while `watch` is set."""

    entries: list[float] = field(default_factory=list)
    """Entries read per level, summed over queries and layers, averaged over KV heads."""
    queries: float = 0.0
    """Queries counted, summed over layers."""
    backends: set[str] = field(default_factory=set)
    evidence_from: int | None = None
    """Queries from this position on have their attention to opened chunks recorded."""
    mass: dict[int, Tensor] = field(default_factory=dict)
    """Per layer: attention mass of each chunk of level 1, (H, C), of the queries from `evidence_from` on."""

    def count(self, cover: Cover, blocks: Blocks) -> None:
        found = cover.entries_per_level(blocks)
        self.entries = [a + b for a, b in zip(self.entries or [0.0] * len(found), found, strict=True)]
        self.queries += float(blocks.length.sum())

    def attribute(self, layer: int, cover: Cover, mass: Tensor) -> None:
        heads, chunks = cover.opened.shape[1], int(cover.opened.max()) + 1 if cover.opened.numel() else 0
        kept = self.mass.get(layer, torch.zeros(heads, 0))
        if chunks > kept.shape[1]:
            kept = torch.nn.functional.pad(kept, (0, chunks - kept.shape[1]))
        ok = cover.opened >= 0
        for block_index, block_ok, block_mass in zip(cover.opened.cpu(), ok.cpu(), mass.float().cpu(), strict=True):
            kept.scatter_add_(1, block_index.clamp_min(0), block_mass * block_ok)
        self.mass[layer] = kept


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
    _, query_heads, _, dim = queries.shape
    heads = pyramid.keys[0].shape[1]
    heard = Heard(
        queries.detach(), plan.first.tolist(), plan.before.tolist(), plan.dense_to.tolist(), reading.positions
    )
    if observe := getattr(reading.policy, "observe", None):
        with torch.no_grad():
            observe(heard, pyramid)
    evict = getattr(reading.policy, "evict", None)
    out = torch.zeros_like(queries)
    for groups in plan.stages(reading.policy.by_block) if evict else [plan.groups]:  # type: ignore[attr-defined]
        if evict:
            with torch.no_grad():
                evict(heard, plan.begin(groups), pyramid)
        for dense, blocks in groups:
            for part in _segments(dense, blocks, reading, pyramid, query_heads, dim, softcap is not None):
                taken, live = _take(queries, plan.first, part.row, part.start, part.length, part.size)
                cover = _choose(queries, recent, part, plan, pyramid, reading, heads, dense)
                there = part.moved(pyramid.gone)
                got = attend(taken, there, cover, pyramid, reading.positions, scale, softcap, reading.backend)
                _put(out, got, plan.first, part, live)
                if record is not None:
                    _watch(record, taken, there, cover, pyramid, reading, scale, softcap, layer)
        if evict:
            with torch.no_grad():
                reading.policy.count(heard, plan.read_to(groups), pyramid)  # type: ignore[attr-defined]
    return out


def history(schedule: Schedule, position: int = 0) -> int:
    """Queries that must be kept from call to call so that blocks from `position` on can vote.

    A block with `lookahead="block"` needs them when a call cuts it.
    """
    blocks = [span.block for span in schedule.spans if span.block > 1 and (span.stop is None or span.stop > position)]
    return 2 * max(blocks, default=0)


def _choose(
    queries: Tensor,
    recent: Tensor | None,
    blocks: Blocks,
    plan: Plan,
    pyramid: Pyramid,
    reading: Reading,
    heads: int,
    dense: bool,
) -> Cover:
    with torch.no_grad():
        if dense:
            return dense_cover(blocks, heads, reading.levels, queries.device)
        voters = _voters(queries.detach(), recent, blocks, plan) if reading.policy.votes else None
        return reading.policy.choose(voters, blocks.moved(pyramid.gone), pyramid, reading.levels)


def _voters(queries: Tensor, recent: Tensor | None, blocks: Blocks, plan: Plan) -> Voters:
    """The voting queries of each block: those of this call, and `recent` ones from before it."""
    asked = blocks.row, blocks.vote_from, blocks.vote_to - blocks.vote_from, blocks.votes
    taken, live = _take(queries, plan.first, *asked)
    old = blocks.vote_from[:, None] + torch.arange(blocks.votes) < plan.before[blocks.row][:, None]
    if not bool(old.any()):
        return Voters(taken, live)
    here = old.to(taken.device)
    if recent is None or not recent.shape[2]:
        return Voters(taken, live & ~here)
    past, kept = _take(recent, plan.before - recent.shape[2], *asked)
    return Voters(torch.where(here[:, None, :, None], past, taken), torch.where(here, kept, live))


def _segments(
    dense: bool, blocks: Blocks, reading: Reading, pyramid: Pyramid, query_heads: int, dim: int, written: bool = False
) -> list[Blocks]:
    """Cuts a group so that no working tensor grows with the call. `written`: logits are written out, head by head."""
    heads = pyramid.keys[0].shape[1]
    room = GPU_ELEMENTS if pyramid.keys[0].is_cuda else CPU_ELEMENTS
    tokens = int(blocks.stop.max()) if len(blocks) else 0
    if dense:
        per_block = blocks.size * tokens * (query_heads if written else 1)
    else:
        window = (
            blocks.size
            + int((blocks.start - blocks.decide).max())
            + getattr(reading.policy, "window", tokens)
            + reading.levels.chunk
        )
        entries = reading.policy.read_at_most(tokens, reading.levels) + window
        voting = query_heads * blocks.votes * (tokens // reading.levels.chunk) // 4 if reading.policy.votes else 0
        choosing = 8 * heads * (tokens // reading.levels.chunk)
        size = blocks.size * (query_heads // heads if written else 1)
        per_block = max(min(entries, tokens) * heads * max(dim, size), voting, choosing)
    step = max(1, room // max(per_block, 1))
    return [blocks[first : first + step] for first in range(0, len(blocks), step)]


def _take(
    states: Tensor, first: Tensor, row: Tensor, start: Tensor, length: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Rows of queries (B, Hq, L, D) cut into pieces (N, Hq, size, D); `live` (N, size) marks real ones."""
    column = (start - first[row])[:, None] + torch.arange(size)
    live = (torch.arange(size) < length[:, None]) & (column >= 0)
    column = column.clamp(0, states.shape[2] - 1)
    taken = states.transpose(1, 2)[row[:, None].to(states.device), column.to(states.device)]
    return taken.transpose(1, 2).contiguous(), live.to(states.device)


def _put(out: Tensor, got: Tensor, first: Tensor, blocks: Blocks, live: Tensor) -> None:
    """Writes pieces (N, Hq, Q, D) back in place: a copy of the call for every segment would cost its square."""
    column = (blocks.start - first[blocks.row])[:, None] + torch.arange(blocks.size)
    row = blocks.row[:, None].expand_as(column)
    place = live.cpu()
    index = (row[place].to(out.device), column[place].to(out.device))
    out.transpose(1, 2).index_put_(index, got.transpose(1, 2)[live])


def _watch(
    record: Record,
    taken: Tensor,
    blocks: Blocks,
    cover: Cover,
    pyramid: Pyramid,
    reading: Reading,
    scale: float,
    softcap: float | None,
    layer: int,
) -> None:
    record.count(cover, blocks)
    from_here = record.evidence_from
    if from_here is None or not cover.opened.shape[-1] or int(blocks.start.max()) < from_here:
        return
    with torch.no_grad():
        mass = blockwise.masses(taken, blocks, cover, pyramid, reading.positions, scale, softcap)
    answering = (blocks.start >= from_here).to(mass.device)
    record.attribute(layer, cover, mass * answering[:, None, None])
