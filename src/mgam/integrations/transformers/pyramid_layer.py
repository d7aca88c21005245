"""A layer of a cache that attends multi-granularly: its pyramid, schedules, and the queries that may still vote."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgam.engine import history
from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.rows_layer import RowsLayer
from mgam.integrations.transformers.tail import Tail
from mgam.levels import Levels
from mgam.plan import Plan
from mgam.pyramid import Pyramid
from mgam.record import Record
from mgam.schedule import Schedule, Span

SPARE = 16
"""Tokens at the end of a prompt that a cache can be cropped by while all voters of the query block there are known."""


class PyramidLayer(RowsLayer):
    """One layer: a pyramid, the schedule of each row, and the recent queries that may still vote."""

    is_sliding = False

    def __init__(
        self,
        levels: Levels,
        schedules: Sequence[Schedule] | None = None,
        reserve: int = 0,
        block: int = 128,
        positions: str = "granular",
        method: str = "mgam",
        stateful: bool = False,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.positions = positions
        self.method = method
        self.stateful = stateful
        """Whether the method forgets tokens or keeps what it learnt on the way: then no other can go on from here."""
        self.block = block
        self.given = None if schedules is None else list(schedules)
        self.reserve = reserve
        self.record: Record | None = None
        self._start()

    def _start(self) -> None:
        self.pyramid = Pyramid(self.levels)
        if self.reserve:
            self.pyramid.reserve(self.reserve)
        self.schedules: list[Schedule] = list(self.given or [])
        self._votes = Tail()
        self._ended: tuple[Tail, list[int]] | None = None
        self._cropped = False
        self._beams: tuple[int, list[int]] | None = None
        self._alike = False
        """Whether beams are known to share their prompt; else its states are compared when they are first reordered."""
        self.columns = 0
        self.ahead, self.next_position = [], []
        self.is_initialized = False

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds; empty before the first call."""
        return self.pyramid.lengths

    @property
    def recent(self) -> Tensor | None:
        """The last queries of each row (B, Hq, R, D), for blocks that began before the call."""
        return None if self._votes.states is None else self._votes.states[0]

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[int]:
        """Adds a call's states and returns the rows' lengths before it."""
        rows = keys.shape[0]
        before = self._open(keys, counts, self.pyramid.keys[0] if self.pyramid.lengths else None)
        if not self.pyramid.lengths:
            if not self.schedules:
                self.schedules = [Schedule((Span(max(count, 1), self.block), Span(None, 1))) for count in counts]
            if rows % len(self.schedules):
                raise UnsupportedModelError(f"a cache for {len(self.schedules)} rows was given {rows}")
            repeats = rows // len(self.schedules)
            self.schedules = [schedule for schedule in self.schedules for _ in range(repeats)]
            self._beams = (repeats, list(counts)) if repeats > 1 else None
            self._alike = False
        self.pyramid.append(keys, values, counts)
        self._count(keys)
        return before

    def remember(self, queries: Tensor, counts: Sequence[int]) -> None:
        """Keeps the last queries (B, Hq, R, D) for blocks that go on in the next call.

        When no block to come has voters, those of the last ones are set aside, for a crop that opens one again.
        """
        lengths = self.pyramid.lengths
        before = [length - count for length, count in zip(lengths, counts, strict=True)]
        if all(schedule.alone_from <= old for schedule, old in zip(self.schedules, before, strict=True)):
            return
        most = self._history(lengths)
        if not most and not self._history(before):
            return
        keep = most or SPARE + self._history([schedule.prompt - 1 for schedule in self.schedules])
        if self._votes.states is None and list(counts) != lengths:
            keep = min(keep, *counts)  # earlier queries are gone: columns without one must not look as if they had one
        states, held = self._votes.joined([queries.detach()], counts)
        self._votes.keep(states, held, keep)
        self._ended = None if most else (self._votes, list(lengths))
        if not most:
            self._votes = Tail()

    def reset(self) -> None:
        """Forgets everything."""
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; given as a negative number or, as older transformers do, as the length to keep."""
        remove = self._to_remove(tokens_to_remove)
        if remove and self.pyramid.lengths:
            self.pyramid.crop([remove] * len(self.pyramid.lengths))
            self._crop_votes(remove)
            self._forget_columns(remove)
            if self._beams is not None:
                self._beams = self._beams[0], list(map(min, self._beams[1], self.pyramid.lengths))

    def _history(self, places: Sequence[int]) -> int:
        return max(history(schedule, place) for schedule, place in zip(self.schedules, places, strict=True))

    def _crop_votes(self, remove: int) -> None:
        self._votes.crop(remove)
        self._cropped = True
        if self._ended is None:
            return
        votes, ends = self._ended
        beyond = {end - length for end, length in zip(ends, self.pyramid.lengths, strict=True)}
        if max(beyond) > 0:
            self._votes, self._ended = Tail(), None
            if len(beyond) == 1:
                self._votes = votes
                votes.crop(beyond.pop())

    def check_votes(self, plan: Plan) -> None:
        """Refuses a call after `crop` whose query blocks began before it, with voters that are no longer kept.

        Raises:
            UnsupportedModelError: without these they would choose otherwise than in a text that was not cropped.
        """
        if not self._cropped:
            return
        held = torch.tensor(self._votes.held if self.recent is not None else [0] * len(plan.before))
        for dense, blocks in plan.groups:
            if not dense and bool((blocks.vote_from < (plan.before - held)[blocks.row]).any()):
                raise UnsupportedModelError(
                    "the cache was cropped into a query block, and the queries that vote for the rest of it are not "
                    "kept; crop to where a block begins, or go back with bookmark() and go_back()"
                )

    def bookmark(self) -> Any:
        """Where the layer stands; a copy of the whole layer where the method forgets, else next to nothing."""
        if self.stateful:
            return copy.deepcopy(self)
        state = {name: copy.copy(getattr(self, name)) for name in ("schedules", "ahead", "next_position")}
        votes, ended = copy.copy(self._votes), copy.deepcopy(self._ended)
        return self.columns, list(self.lengths), votes, ended, state

    def go_back(self, place: Any) -> None:
        """Returns to where `bookmark` was called, with the voters of then."""
        if isinstance(place, PyramidLayer):
            record = self.record
            self.__dict__.update(copy.deepcopy(place).__dict__)
            self.record = record
            return
        columns, lengths, votes, ended, state = place
        if len(lengths) != len(self.lengths) or columns > self.columns:
            raise UnsupportedModelError(
                f"the cache holds {len(self.lengths)} rows of {self.columns} columns, the bookmark {len(lengths)} of "
                f"{columns}: rows were repeated or forgotten since it was made"
            )
        self.pyramid.crop([new - old for new, old in zip(self.lengths, lengths, strict=True)])
        self.columns, self._votes, self._beams = columns, copy.copy(votes), None
        self._ended = copy.deepcopy(ended)
        self.__dict__.update(copy.deepcopy(state))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self._beams = (repeats, list(self.pyramid.lengths)) if self.pyramid.lengths else None
        self._alike = True

    def _equal(self, group: int, tokens: int) -> bool:
        """Whether the rows of each group begin with the same tokens, as beams do and other texts do not."""
        heads = (
            part[:, :, :tokens].unflatten(0, (-1, group)) for part in (self.pyramid.keys[0], self.pyramid.values[0])
        )
        return all(bool((part == part[:, :1]).all()) for part in heads)

    def _select(self, rows: Tensor) -> None:
        chosen, shared = rows.tolist(), 0
        if self._beams is not None:
            group, lengths = self._beams
            within = len(chosen) == len(lengths) and all(
                row // group == place // group for place, row in enumerate(chosen)
            )
            if within and (self._alike or self._equal(group, min(lengths))):
                shared, self._alike = min(lengths), True
            else:
                self._beams = None
        if shared:
            self.pyramid.select(rows, shared)
        else:
            self.pyramid.select(rows)
        self.schedules = [self.schedules[row] for row in rows.tolist()]
        self._votes.select(rows)
        if self._ended is not None:
            self._ended[0].select(rows)
            self._ended = self._ended[0], [self._ended[1][row] for row in rows.tolist()]
