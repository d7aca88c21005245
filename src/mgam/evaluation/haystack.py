"""Fills a document with filler up to a number of tokens, and puts needles at given depths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from mgam.errors import SettingError
from mgam.evaluation.sample import Span
from mgam.evaluation.tokens import TokenCounter

DRAW = 256  # pieces counted in one call of the tokenizer
FULL_ENOUGH = 0.97  # share of the room that counts as filled
TRIES = 5


@dataclass(frozen=True)
class Needle:
    """A sentence or record to hide, and where."""

    text: str
    depth: float  # 0: before all filler, 1: after all of it


@dataclass(frozen=True)
class Haystack:
    """A finished document and where its needles stand, in the order in which they were given."""

    text: str
    spans: tuple[Span, ...]
    tokens: int


def build_haystack(
    filler: Iterator[str],
    needles: Sequence[Needle],
    room: int,
    counter: TokenCounter,
    *,
    joiner: str = "",
    head: str = "",
    tail: str = "",
    keep_out: tuple[int, int] = (0, 0),
) -> Haystack:
    """Joins filler pieces and needles into a document of at most `room` tokens, filled as far as the filler goes.

    Pieces and needles bring the white space that stands before them; at the very start it is dropped. Depths are
    shares of the filler's tokens. Needles of equal depth keep their order. `keep_out` counts tokens at both ends in
    which no needle may stand. Raises SettingError when the needles alone do not fit.
    """
    drawn, counts = _Filler(filler, counter), counter.counts([needle.text for needle in needles])
    fixed = sum(counts) + counter.count(head + tail)
    if fixed + sum(keep_out) > room:
        raise SettingError(
            f"the needles of this task need {fixed} tokens (and {sum(keep_out)} are kept free of them), but the "
            f"document may have {room}; give --lengths of at least {fixed + sum(keep_out) + 512}"
        )
    wanted, best = float(room - fixed), None
    for _ in range(TRIES):
        pieces, sizes = drawn.take(int(wanted))
        text, spans = _lay_out(pieces, sizes, needles, joiner, head, tail, keep_out)
        exact = counter.count(text)
        if exact <= room and (best is None or exact > best.tokens):
            best = Haystack(text, spans, exact)
        if best is not None and (best.tokens >= FULL_ENOUGH * room or drawn.exhausted):
            return best
        wanted *= (room * 0.99 - fixed) / max(1, exact - fixed)
    if best is None:
        raise SettingError(f"no haystack of at most {room} tokens can be made from pieces this long; raise the length")
    return best


class _Filler:
    """Pieces drawn from an iterator as they are needed, each with its token count."""

    def __init__(self, source: Iterator[str], counter: TokenCounter) -> None:
        self._source, self._counter = source, counter
        self._pieces: list[str] = []
        self._ends: list[int] = []
        self.exhausted = False

    def take(self, tokens: int) -> tuple[list[str], list[int]]:
        """The first pieces that together have at most `tokens` tokens."""
        while not self.exhausted and (not self._ends or self._ends[-1] < tokens):
            more = list(islice(self._source, DRAW))
            self.exhausted = len(more) < DRAW
            last = self._ends[-1] if self._ends else 0
            self._ends += list(accumulate(self._counter.counts(more), initial=last))[1:]
            self._pieces += more
        end = bisect_left(self._ends, tokens + 1)
        return self._pieces[:end], self._ends[:end]


def _lay_out(
    pieces: list[str],
    ends: list[int],
    needles: Sequence[Needle],
    joiner: str,
    head: str,
    tail: str,
    keep_out: tuple[int, int],
) -> tuple[str, tuple[Span, ...]]:
    total = ends[-1] if ends else 0
    first, last = keep_out
    inside = max(0, total - first - last)
    starts = [0, *ends]
    places = [
        min(len(pieces), bisect_left(starts, first + needle.depth * inside)) if inside else len(pieces) // 2
        for needle in needles
    ]
    order = sorted(range(len(needles)), key=lambda number: (places[number], needles[number].depth, number))
    parts: list[str] = []
    where: dict[int, int] = {}
    begun = 0
    for number in order:
        parts += pieces[begun : places[number]]
        begun = places[number]
        where[number] = len(parts)
        parts.append(needles[number].text)
    parts += pieces[begun:]
    if not head and parts:
        parts[0] = parts[0].lstrip()
    offsets = list(accumulate((len(part) + len(joiner) for part in parts), initial=len(head)))
    spans = tuple(_span(offsets[where[number]], parts[where[number]]) for number in range(len(needles)))
    return head + joiner.join(parts) + tail, spans


def _span(offset: int, part: str) -> Span:
    """Where `part` stands, without the white space before it."""
    return offset + len(part) - len(part.lstrip()), offset + len(part)
