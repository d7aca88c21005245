"""The training-free search: every voting query looks at keys of about four tokens; each chunk counts by its best."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgam import kernels
from mgam.cover import Cover, Known, cover_of, dense_cover, windows
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.policies.asked import Asked, flat, plain_scores
from mgam.policies.base import WHOLE, Rest, Voters, at_most
from mgam.policies.compact import Compact, CompactKeys
from mgam.pyramid import Pyramid
from mgam.schedule import Blocks, sent

TILE = 128
"""Chunks scored at a time: the scores of a tile stay in the processor's cache."""
THIN, FULL = 1, 2
"""How blocks search: a part of their queries is heard; full keys are searched."""


@dataclass(frozen=True)
class Scored:
    """Opens the chunks with the most softmax mass.

    For each voting query, a chunk's logit is that of its best search key; a softmax over all complete chunks of the
    past turns logits into mass; masses add up over the voters and the query heads of the group. The `budget // chunk`
    best chunks between sink and window are opened, once per KV head.
    """

    budget: int = 1024
    window: int = 512
    rest: Rest = "summaries"
    mass: float = 1.0
    scale: float | None = None
    every: int = 1
    """Every n-th query of a larger block votes (the last one always)."""
    compact: Compact | None = None
    """Shorter search keys for blocks beyond the tokens that give their basis; None searches full keys."""
    whole: int = WHOLE
    """Blocks of at most so many voters are heard in full: those of questions, which are few and look things up."""

    votes = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.whole < 0:
            raise SettingError(
                f"every={self.every}: the stride of voting queries starts at 1; whole={self.whole}: starts at 0"
            )

    def choose(self, voters: Voters | None, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Cover:
        """Covers for N blocks within the budget."""
        assert voters is not None
        states = pyramid.keys[0]
        device, heads = states.device, states.shape[1]
        begin, start = windows(blocks, self.window, levels, device)
        chunks = blocks.once(("before", self.window, levels), lambda: max(begin.tolist(), default=0) // levels.chunk)
        most = self.budget // levels.chunk
        if kernels.serve(states) and most:
            return self._choose_on_device(voters, blocks, pyramid, levels, chunks)
        opened = torch.zeros(len(blocks), heads, chunks, dtype=torch.bool, device=device)
        number = torch.arange(chunks, device=device)
        allowed = (number > 0) & ((number + 1) * levels.chunk <= start[:, None])
        if chunks - 1 <= most:
            opened |= allowed[:, None]
        elif most:
            scores = self.scores(voters, blocks, pyramid, levels)[..., :chunks]
            opened = highest(scores.masked_fill(~allowed[:, None], -1.0), most) & allowed[:, None]
        return cover_of(opened, start, levels, rest=self.rest, mass=self.mass, most=1 + most)

    def _choose_on_device(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int) -> Cover:
        """The same by kernels, without waiting for them."""
        from mgam.policies import search_triton

        states = pyramid.keys[0]
        begin, start = windows(blocks, self.window, levels, states.device)
        most = self.budget // levels.chunk

        def known(cover: Cover, few: int) -> Cover:
            return replace(cover, known=Known(begin, search_triton.most_entries(chunks, few, levels, self.rest)))

        def made(scores: Tensor, few: int) -> Cover:
            return known(search_triton.cover(scores, start, levels, few, rest=self.rest, mass=self.mass), few)

        if not chunks:
            return dense_cover(blocks, states.shape[1], levels, states.device)
        heads = states.shape[1]
        if chunks - 1 <= most:
            every = ("every", self.rest, self.mass, self.window, levels, heads, states.device)
            return blocks.once(
                every, lambda: made(states.new_zeros(len(blocks), heads, chunks, dtype=torch.float32), chunks)
            )
        parts, kind = self._kinds(blocks, states.device)
        if parts:
            return made(self.scores(voters, blocks, pyramid, levels)[..., :chunks], most)
        asked = self._asked(voters, blocks, pyramid, levels, kind)
        judged = _judged(blocks, levels)
        found = search_triton.cover_of(asked, judged, start, levels, most, rest=self.rest, mass=self.mass)
        return known(found, most)

    def early(self, blocks: Blocks) -> int:
        """How many blocks at the front of a text are chosen before compact keys have their basis; 0 where none are, or
        all, or where blocks do not follow one another in one row."""
        if self.compact is None or not self.budget:
            return 0
        calibrate = self.compact.calibrate

        def find() -> int:
            early = int((blocks.decide < calibrate).sum())
            alike = bool((blocks.row == blocks.row[:1]).all()) and bool((blocks.decide[:early] < calibrate).all())
            return early if alike and early < len(blocks) else 0

        return blocks.once(("early", calibrate), find)

    def ahead(self, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> CompactKeys | None:
        """Begins to make compact keys, on a device, while `early` blocks are searched and read without them."""
        if self.compact is None or not pyramid.in_memory or not kernels.serve(pyramid.keys[0]):
            return None
        if self.budget >= pyramid.tokens:  # all is opened: nobody searches
            return None
        return CompactKeys.ahead(pyramid, levels, self.compact) if self.early(blocks) else None

    def read_at_most(self, tokens: int, levels: Levels) -> int:
        """Sink, budget, and the summaries around what is opened."""
        return at_most(self.budget, self.rest, tokens, levels)

    def scores(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels) -> Tensor:
        """Mass (N, H, chunks) that the voters give each complete chunk before the decision, in float32 or finer.

        Chunks that the window holds take their share too: a voter that looks nearby has little to say about the far
        past, and a block's scores do not depend on the blocks that are scored with it.
        """
        chunks = int(blocks.decide.max()) // levels.chunk
        device = voters.queries.device
        parts, kind = self._kinds(blocks, device)
        if not parts:
            return self._scores(voters, blocks, pyramid, levels, chunks, kind)
        if kernels.serve(voters.queries):
            return self._scores_apart(parts, voters, pyramid, levels, chunks)
        some = [(place, self._scores(voters[place], part, pyramid, levels, chunks, how)) for place, part, how in parts]
        wide = torch.float64 if any(part.dtype == torch.float64 for _, part in some) else torch.float32
        found = torch.empty(len(blocks), pyramid.keys[0].shape[1], chunks, dtype=wide, device=device)
        for place, scores in some:
            found[place] = scores.to(wide)
        return found

    def _scores_apart(
        self,
        parts: list[tuple[slice | Tensor, Blocks, int]],
        voters: Voters,
        pyramid: Pyramid,
        levels: Levels,
        chunks: int,
    ) -> Tensor:
        """Scores of blocks that search in different ways, by kernels: each part where it stands, as far as it may
        judge."""
        from mgam.policies import search_triton

        device = voters.queries.device
        count, heads = sum(len(part) for _, part, _ in parts), pyramid.keys[0].shape[1]
        found = torch.empty(count, heads, chunks, dtype=torch.float32, device=device)
        for place, part, kind in parts:
            asked = self._asked(voters[place], part, pyramid, levels, kind)
            judged = _judged(part, levels)
            if isinstance(place, slice):
                search_triton.scores(asked, judged, out=found[place])
            else:
                found[place] = search_triton.scores(asked, chunks)
        return found

    def _kinds(self, blocks: Blocks, device: torch.device) -> tuple[list[tuple[slice | Tensor, Blocks, int]], int]:
        """The blocks by how they search, THIN, over FULL keys, or both, where they differ; else how all do."""
        compact, every, whole = self.compact, self.every, self.whole

        def find() -> tuple[list[tuple[slice | Tensor, Blocks, int]], int]:
            thin = (blocks.voting > whole) & (every > 1)
            early = blocks.decide.cpu() < compact.calibrate if compact is not None else torch.ones_like(thin)
            kinds = THIN * thin + FULL * early
            return blocks.apart(kinds, device), int(kinds[0])

        return blocks.once(("kinds", compact, every, whole, device), find)

    def _asked(self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, kind: int) -> Asked:
        """The search of blocks of one kind, over compact keys or over full ones."""
        queries, live = _heard(voters, blocks, self.every if kind & THIN else 1)
        scale = self.scale if self.scale is not None else queries.shape[-1] ** -0.5
        there = blocks.on(queries.device)
        row = there.row
        visible = blocks.once(("visible", levels, row.device), lambda: there.decide // levels.chunk)
        assert pyramid.search is not None
        if kind & FULL or self.compact is None:
            return flat(queries, live, pyramid.search, row, visible, scale)
        return CompactKeys.of(pyramid, levels, self.compact).asked(queries, live, row, visible, scale)

    def _scores(
        self, voters: Voters, blocks: Blocks, pyramid: Pyramid, levels: Levels, chunks: int, kind: int
    ) -> Tensor:
        if not kind & FULL or kernels.serve(voters.queries):
            asked = self._asked(voters, blocks, pyramid, levels, kind)
            return _device_scores(asked, chunks) if kernels.serve(voters.queries) else plain_scores(asked, chunks)
        queries, live = _heard(voters, blocks, self.every if kind & THIN else 1)
        scale = self.scale if self.scale is not None else queries.shape[-1] ** -0.5
        logits = chunk_logits(queries, blocks, pyramid, chunks)
        ends = (torch.arange(1, chunks + 1, device=logits.device) * levels.chunk)[None]
        visible = ends <= blocks.decide.to(logits.device)[:, None]
        wide = torch.promote_types(queries.dtype, torch.float32)
        masked = (logits.to(wide) * scale).masked_fill(~visible[:, None, None], -torch.inf)
        mass = torch.softmax(masked, -1).nan_to_num(0.0)
        return (mass * live[:, None, :, None].repeat(1, 1, mass.shape[2] // live.shape[1], 1)).sum(2)


def _judged(blocks: Blocks, levels: Levels) -> int:
    """Complete chunks before the last decision."""
    return blocks.once(("judged", levels), lambda: int(blocks.decide.max()) // levels.chunk)


def highest(scores: Tensor, most: int) -> Tensor:
    """Mask of the `most` highest scores along the last axis; of equal ones the first, so that ties never flip."""
    edge = scores.topk(most, -1).values[..., -1:]
    above, level = scores > edge, scores == edge
    return above | (level & (level.cumsum(-1) <= most - above.sum(-1, keepdim=True)))


def chunk_logits(queries: Tensor, blocks: Blocks, pyramid: Pyramid, chunks: int) -> Tensor:
    """Best unscaled logit of each voter in each chunk: (N, H, G*V, chunks), in the precision of the search keys."""
    assert pyramid.search is not None
    count, query_heads, votes, dim = queries.shape
    heads = pyramid.search.shape[1]
    search = pyramid.search
    folded = queries.reshape(count, heads, query_heads // heads * votes, dim).to(search.dtype)
    rows = blocks.row.tolist()
    best = torch.empty(*folded.shape[:3], chunks, dtype=search.dtype, device=queries.device)
    for row in dict.fromkeys(rows):
        members = [n for n, other in enumerate(rows) if other == row]
        part = slice(members[0], members[-1] + 1) if members == list(range(members[0], members[-1] + 1)) else members
        asked = folded[part].transpose(0, 1).reshape(heads, -1, dim)
        for first in range(0, chunks, TILE):
            tile = search[row, :, :, first : min(first + TILE, chunks)]
            width = tile.shape[2]
            logits = asked @ tile.reshape(heads, -1, dim).transpose(1, 2)
            peak = logits.view(heads, asked.shape[1], -1, width).amax(2)
            best[part, :, :, first : first + width] = peak.view(heads, len(members), -1, width).transpose(0, 1)
    return best


def _device_scores(asked: Asked, chunks: int) -> Tensor:
    from mgam.policies import search_triton

    return search_triton.scores(asked, chunks)


def _heard(voters: Voters, blocks: Blocks, every: int) -> tuple[Tensor, Tensor]:
    """Every n-th voter of each block, counted back from its last one."""
    count = blocks.voting
    least, most = blocks.once("votes", lambda: (int(count.min()), int(count.max())))
    if every == 1:
        return voters.queries[:, :, :most], voters.live[:, :most]
    if least == most:
        some = slice((most - 1) % every, most, every)
        alive = blocks.once_with(("alive", every), voters.live, lambda: voters.live[:, some].contiguous())
        return voters.queries[:, :, some], alive
    device = voters.live.device

    def find() -> tuple[Tensor, Tensor]:
        number = count[:, None]
        place = (number - 1) % every + torch.arange(0, most, every)
        there = place < number
        return sent(place.clamp_max(most - 1), device), sent(there, device)

    place, live = blocks.once(("heard", every, device), find)
    chosen = place[:, None, :, None].expand(-1, voters.queries.shape[1], -1, voters.queries.shape[3])
    return voters.queries.gather(2, chosen), voters.live.gather(1, place) & live
