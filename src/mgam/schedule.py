"""The schedule: which queries share one cover, and who may decide it.

Borders are counted from a row's first real token and never from call boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mgam.errors import SettingError

Lookahead = Literal["none", "block"]
Found = TypeVar("Found")
_NOTHING: Any = object()


@dataclass(frozen=True)
class Span:
    """A stretch of a text whose query blocks have one size."""

    stop: int | None
    """First position after the span; None for the last span, which has no end."""

    block: int
    """Queries per block, counted from the start of the span."""

    lookahead: Lookahead = "none"
    """`none`: a block's cover is decided by queries up to its first position. `block`: by all its queries
    (declared as selection-leak(block); only for a given text that is being read)."""


@dataclass(frozen=True)
class Schedule:
    """The ordered spans of a text."""

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        stops = [span.stop for span in self.spans]
        if not stops or stops[-1] is not None or None in stops[:-1]:
            raise SettingError("a schedule needs spans of which exactly the last has no end (stop=None)")
        finite = [stop for stop in stops if stop is not None]
        if finite != sorted(finite) or min(finite, default=0) < 0 or any(span.block < 1 for span in self.spans):
            raise SettingError(f"spans {self.spans} must have growing ends and blocks of at least 1 query")

    @classmethod
    def uniform(cls, block: int = 128, lookahead: Lookahead = "none") -> Schedule:
        """Blocks of one size without end; with `lookahead="none"` what training and loss figures use."""
        return cls((Span(None, block, lookahead),))

    @classmethod
    def reading(
        cls,
        document: int,
        question: int,
        *,
        block: int = 128,
        question_block: int = 32,
        lookahead: Lookahead = "block",
    ) -> Schedule:
        """A document of `document` tokens, a question of `question` tokens, then generation token by token."""
        spans = [Span(document, block, lookahead)] if document else []
        if question:
            spans.append(Span(document + question, question_block, lookahead))
        return cls((*spans, Span(None, 1, "none")))

    @property
    def prompt(self) -> int:
        """Where the last span begins: the length of what is given before generation, 0 for a uniform schedule."""
        return max((span.stop or 0 for span in self.spans[:-1]), default=0)

    @property
    def text(self) -> int | None:
        """Where the first span ends: queries after it ask of what it holds. None where nothing follows."""
        return self.spans[0].stop

    @cached_property
    def alone_from(self) -> float:
        """Position from which on every query has a block of its own; infinite where blocks never end."""
        ends = [math.inf if span.stop is None else span.stop for span in self.spans if span.block > 1]
        return max(ends, default=0)

    def pieces(self, start: int, stop: int, dense_until: int = 0) -> Iterator[Piece]:
        """The parts of query blocks that a call over positions [start, stop) computes.

        A block with `lookahead="block"` that does not lie whole inside the call is read as with `lookahead="none"`: its
        parts share one cover, which queries up to its first decide. Queries before `dense_until` never share a block
        with later ones.
        """
        begin = 0
        for span in self.spans:
            end = stop if span.stop is None else min(span.stop, stop)
            if end > start and end > begin:
                yield from _cut(span, begin, start, end, dense_until)
            if span.stop is None or span.stop >= stop:
                return
            begin = span.stop


@dataclass(frozen=True)
class Piece:
    """Consecutive queries of one block. `decide`: position at which the block's cover is fixed; votes come from
    queries in [vote_from, vote_to)."""

    start: int
    stop: int
    decide: int
    vote_from: int
    vote_to: int
    dense: bool


def _cut(span: Span, begin: int, start: int, end: int, dense_until: int) -> Iterator[Piece]:
    """Pieces of one span that fall in [start, end)."""
    first = begin + max(0, start - begin) // span.block * span.block
    limit = span.stop
    for block_start in range(first, end, span.block):
        block_stop = block_start + span.block if limit is None else min(block_start + span.block, limit)
        low, high = max(block_start, start), min(block_stop, end)
        if low < dense_until:
            yield Piece(low, min(high, dense_until), low, low, low + 1, True)
            low = min(high, dense_until)
            if low >= high:
                continue
        block_start = max(block_start, dense_until)
        if span.lookahead == "block" and low == block_start and high == block_stop:
            yield Piece(low, high, block_start, block_start, block_stop, False)
        else:
            # As many voters as a whole block has: a block that the end of its span cuts short chooses as if it went on.
            yield Piece(low, high, block_start, max(0, block_start + 1 - span.block), block_start + 1, False)


@dataclass(frozen=True)
class Blocks:
    """Query blocks of all rows, flattened: N blocks of at most `size` queries.

    Shapes: every tensor (N,), int64. Positions count from the row's first real token.
    """

    row: Tensor
    start: Tensor
    length: Tensor
    decide: Tensor
    vote_from: Tensor
    vote_to: Tensor
    size: int
    votes: int
    asking: bool = False
    """Whether they stand after the text, in a question or an answer."""
    _known: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` gives, found once: the layers of a call share its blocks and what follows from them alone."""
        found: Found = self._known.get(key, _NOTHING)
        if found is _NOTHING:
            found = self._known[key] = find()
        return found

    def once_with(self, key: Hashable, other: Tensor, find: Callable[[], Found]) -> Found:
        """The same of these blocks and another tensor, found anew where that is another one."""
        kept: dict[str, Any] = self.once(("with", key), dict)
        if kept.get("other") is not other:
            kept.update(other=other, found=find())
        found: Found = kept["found"]
        return found

    def __len__(self) -> int:
        return self.row.shape[0]

    def places(self) -> list[tuple[int, int]]:
        """(row, first position) of each block."""
        return list(zip(self.row.tolist(), self.start.tolist(), strict=True))

    def runs(self) -> list[tuple[int, int]]:
        """Stretches [first, last) of consecutive blocks of one row."""
        rows = self.row.tolist()
        return list(pairwise([0, *(n for n in range(1, len(rows)) if rows[n] != rows[n - 1]), len(rows)]))

    @property
    def stop(self) -> Tensor:
        """First position after each block (N,)."""
        return self.start + self.length

    def moved(self, by: Sequence[int]) -> Blocks:
        """The same blocks where row b has lost `by[b]` tokens before them."""
        return self.once(("moved", *by), lambda: self._moved(by)) if any(by) else self

    def _moved(self, by: Sequence[int]) -> Blocks:
        lost = torch.tensor(list(by))[self.row.cpu()].to(self.row.device)
        places = (self.start - lost, self.decide - lost, self.vote_from - lost, self.vote_to - lost)
        start, decide, vote_from, vote_to = places
        return replace(self, start=start, decide=decide, vote_from=vote_from, vote_to=vote_to)

    def on(self, device: torch.device) -> Blocks:
        """The same blocks on another device, moved there once and without waiting for it."""
        return self if self.row.device == device else self.once(device, lambda: self._moved_to(device))

    def _moved_to(self, device: torch.device) -> Blocks:
        names = ("row", "start", "length", "decide", "vote_from", "vote_to")
        moved = sent(torch.stack([getattr(self, name) for name in names]), device)
        return replace(self, **dict(zip(names, moved, strict=True)))

    def __getitem__(self, part: slice | Tensor) -> Blocks:
        return self._map(lambda tensor: tensor[part])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        return replace(
            self,
            row=change(self.row),
            start=change(self.start),
            length=change(self.length),
            decide=change(self.decide),
            vote_from=change(self.vote_from),
            vote_to=change(self.vote_to),
        )

    def apart(self, kinds: Tensor, device: torch.device) -> list[tuple[slice | Tensor, Blocks, int]]:
        """The blocks of each kind (N,): where they stand, as a slice where they follow one another; they; the kind.
        Nothing where all are of one kind."""
        found: list[tuple[slice | Tensor, Blocks, int]] = []
        every = kinds.unique().tolist()
        for kind in every if len(every) > 1 else ():
            place = (kinds == kind).nonzero().flatten()
            first, last = int(place[0]), int(place[-1]) + 1
            together = last - first == len(place)
            part = self[slice(first, last) if together else place.to(self.row.device)]
            found.append((slice(first, last) if together else sent(place, device), part, int(kind)))
        return found

    @cached_property
    def voting(self) -> Tensor:
        """Voters of each block (N,), on the CPU."""
        return (self.vote_to - self.vote_from).cpu()

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, Piece]], asking: bool = False) -> Blocks:
        """Blocks from (row, piece) pairs."""
        table = torch.tensor(
            [(row, p.start, p.stop - p.start, p.decide, p.vote_from, p.vote_to) for row, p in pieces], dtype=torch.int64
        ).reshape(-1, 6)
        row, start, length, decide, vote_from, vote_to = table.unbind(1)
        size = int(length.max()) if len(pieces) else 0
        votes = int((vote_to - vote_from).max()) if len(pieces) else 0
        return cls(row, start, length, decide, vote_from, vote_to, size, votes, asking)


def sent(table: Tensor, device: torch.device) -> Tensor:
    """A small table on a device, without waiting for what that does."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
