"""Segments: query blocks that are read at once, and the tables that cut them out of a call's columns.

The tables follow from the plan alone. They are made and moved to the device once, and all layers share them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgam.policies.base import Voters
from mgam.schedule import Blocks, sent


@dataclass(frozen=True)
class Columns:
    """The columns of some states that N pieces of at most `size` queries take.

    Shapes: row (N, 1), column and live (N, size), on the device of the states.
    """

    row: Tensor
    column: Tensor
    live: Tensor

    @classmethod
    def of(
        cls, first: Tensor, row: Tensor, start: Tensor, length: Tensor, size: int, columns: int, device: torch.device
    ) -> Columns:
        """Pieces of `length` (N,) queries from position `start` (N,) on; column 0 of row b stands at `first[b]`.

        Places beyond a piece's end take its last query: what stands in the columns after it may be no number.
        """
        number = torch.arange(size)
        column = (start - first[row])[:, None] + torch.minimum(number, (length - 1).clamp_min(0)[:, None])
        live = (number < length[:, None]) & (column >= 0)
        table = torch.stack((row[:, None].expand_as(column), column.clamp(0, max(columns - 1, 0)), live.long()))
        rows, places, there = sent(table, device)
        return cls(rows[:, :1], places, there.bool())

    def take(self, states: Tensor) -> Tensor:
        """The pieces (N, Hq, size, D) of states (B, Hq, L, D)."""
        return states.transpose(1, 2)[self.row, self.column].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Segment:
    """Some blocks of a plan with the tables of a call on a device."""

    dense: bool
    blocks: Blocks
    own: Columns
    votes: Columns
    """`own` where each block's voters are its queries."""
    old: Tensor | None
    """(N, V): votes that were cast before the call; None where there are none."""
    source: Tensor | None
    """(K,): which of N * size places are queries; None: all are."""
    target: tuple[Tensor, Tensor]
    """Row and column (K,) of the call for each of these."""
    span: tuple[int, int, int] | None = None
    """Row, first and last column, where the blocks are whole and follow one another: then nothing is copied."""

    @classmethod
    def of(
        cls, dense: bool, blocks: Blocks, first: Tensor, before: Tensor, columns: int, device: torch.device
    ) -> Segment:
        """The tables of a call of `columns` columns; `first` and `before` as a plan has them."""
        row = blocks.row
        own = Columns.of(first, row, blocks.start, blocks.length, blocks.size, columns, device)
        column = (blocks.start - first[row])[:, None] + torch.arange(blocks.size)
        live = ((torch.arange(blocks.size) < blocks.length[:, None]) & (column >= 0)).flatten()
        source = None if bool(live.all()) else sent(live.nonzero()[:, 0], device)
        rows, places = sent(
            torch.stack((row[:, None].expand_as(column).flatten()[live], column.flatten()[live])), device
        )
        votes, old = own, None
        count = blocks.vote_to - blocks.vote_from
        alike = torch.equal(blocks.vote_from, blocks.start) and torch.equal(count, blocks.length)
        if not dense and not (alike and blocks.votes == blocks.size):
            votes = Columns.of(first, row, blocks.vote_from, count, blocks.votes, columns, device)
            early = blocks.vote_from[:, None] + torch.arange(blocks.votes) < before[row][:, None]
            old = sent(early, device) if bool(early.any()) else None
        return cls(dense, blocks, own, votes, old, source, (rows, places), _span(blocks, column))

    def take(self, queries: Tensor) -> Tensor:
        """The blocks' queries (N, Hq, size, D) of a call (B, Hq, L, D)."""
        return self.own.take(queries) if self.span is None else _cut(queries, self.span, self.blocks.size)

    def place(self, out: Tensor) -> Tensor | None:
        """Where the blocks stand in `out` (B, Hq, L, D), as a view; None where they do not stand together."""
        return None if self.span is None else _cut(out, self.span, self.blocks.size)

    def voters(self, taken: Tensor, queries: Tensor, recent: Tensor | None, before: Tensor) -> Voters:
        """The voting queries of each block: those of this call, and `recent` ones (B, Hq, R, D) from before it.

        `taken`: what `own` took of the queries. A query that is not there does not vote.
        """
        mine = taken if self.votes is self.own else self.votes.take(queries)
        if self.old is None:
            return Voters(mine, self.votes.live)
        held = 0 if recent is None else recent.shape[2]
        if recent is None or not held:
            return Voters(mine, self.votes.live & ~self.old)
        blocks = self.blocks
        past = blocks.once(
            ("past", held, mine.device),
            lambda: Columns.of(
                before - held, blocks.row, blocks.vote_from, blocks.vote_to - blocks.vote_from, blocks.votes, held,
                mine.device,
            ),
        )  # fmt: skip
        both = torch.where(self.old[:, None, :, None], past.take(recent), mine)
        return Voters(both, torch.where(self.old, past.live, self.votes.live))

    def put(self, out: Tensor, got: Tensor) -> None:
        """Writes pieces (N, Hq, size, D) into their columns of `out` (B, Hq, L, D)."""
        place = self.place(out)
        if place is not None:
            place.copy_(got)
            return
        pieces = got.transpose(1, 2).flatten(0, 1)
        chosen = pieces if self.source is None else pieces.index_select(0, self.source)
        out.transpose(1, 2).index_put_(self.target, chosen)


def follow(blocks: Blocks) -> bool:
    """Whether blocks are whole and follow one another in one row."""
    whole = blocks.length == blocks.size
    together = (blocks.row[1:] == blocks.row[:-1]) & (blocks.start[1:] == blocks.start[:-1] + blocks.size)
    return len(blocks) > 0 and bool(whole.all() & together.all())


def _span(blocks: Blocks, column: Tensor) -> tuple[int, int, int] | None:
    if not follow(blocks) or int(column[0, 0]) < 0:
        return None
    return int(blocks.row[0]), int(column[0, 0]), int(column[-1, 0]) + blocks.size


def _cut(states: Tensor, span: tuple[int, int, int], size: int) -> Tensor:
    """A stretch of one row of (B, Hq, L, D) in blocks (N, Hq, size, D), as a view."""
    row, first, last = span
    return states[row, :, first:last].unflatten(1, (-1, size)).transpose(0, 1)


def padded(blocks: Blocks) -> Blocks:
    """The same blocks, said to hold up to a power of two of queries and of votes.

    A kernel is compiled for each size: a text's last, odd block must not cost seconds.
    """
    return replace(blocks, size=_round(blocks.size), votes=_round(blocks.votes))


def _round(count: int) -> int:
    return count if count < 2 else max(16, 1 << (count - 1).bit_length())
