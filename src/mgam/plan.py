"""The plan of a call: which query blocks of like size are read together, and in which order.

One plan serves all layers of a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mgam.schedule import Blocks, Piece, Schedule


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
