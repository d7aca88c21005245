"""The engine: one call of one layer, from new queries to their attention over the pyramid.

Policies, attention and caches do not know one another; they meet here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgam import kernels
from mgam.attend import attend, watched
from mgam.attend.dispatch import serving
from mgam.cover import Cover, Known, dense_cover
from mgam.levels import Levels
from mgam.plan import Plan, Stage
from mgam.policies.base import ByPlace, Heard, Policy
from mgam.policies.scored import Scored
from mgam.positions import Positions
from mgam.pyramid import Pyramid
from mgam.record import Record
from mgam.schedule import Blocks, Schedule
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
    if blocks is None or any(pyramid.gone) or not pyramid.in_memory or _learns(queries, pyramid):
        return None
    policy, dtype = reading.policy_of(blocks), pyramid.keys[0].dtype
    sure = pyramid.steps  # for whom all below was asked before
    if sure is None or sure[0] is not reading or sure[1] is not policy or sure[2] != (dtype, queries.dtype):
        if hasattr(reading.policy, "observe") or hasattr(reading.policy, "evict"):
            return None
        if not kernels.serve(pyramid.keys[0]) or serving(queries, pyramid, reading.backend) != "triton":
            return None
        if not isinstance(policy, Scored) or policy.budget < reading.levels.chunk or pyramid.levels != reading.levels:
            return None
        if queries.dtype != dtype:
            return None
        pyramid.steps = reading, policy, (dtype, queries.dtype)
    assert isinstance(policy, Scored)
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
