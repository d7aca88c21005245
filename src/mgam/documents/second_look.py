"""A second look: the passages that a question attended to most, and those that hold its words, are read once more, by
themselves, and answer it.

Among hundreds of like passages a model rarely answers from the right one at first sight, but it attends to it: more
than to others, and more than a question that asks for nothing does. So what a question attends to is set against what
that one attends to, and the few passages in which they differ most are read in full, as a short text, under the
headings of their sections. Heads that look things up stand in the middle layers, so these alone are asked. (Attention
as a retriever: compare Ye et al. 2025, arXiv 2502.12962, which sums the last layer; setting it against another question
is ours.) Names and numbers are told apart better by words than by attention, so words are asked as well
(`mgam.documents.question_words`), and what the best match leads to is read too (`mgam.documents.references`). What is
read so is looked at once more, line by line (`mgam.documents.closer_look`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mgam.documents.evidence import Evidence, Places
from mgam.documents.headings import heading
from mgam.documents.sources import Source
from mgam.record import Record

NEUTRAL = "What does the text say?"
"""A question that asks for nothing: what it attends to, any question does."""
MIDDLE = (1 / 2, 5 / 6)
"""The layers that are asked, as parts of the depth."""
SLACK = 0.5
"""Added to the share of attention that the neutral question gives a chunk, in parts of an even share."""
DISTINCT = 3.0
"""A preference that some chunk must have, or there is no second look: a question of the text as a whole, such as what
it is about, singles nothing out, and is answered at first sight. Of 39 questions for single facts (none of the test
split) 39 had as much, read with adapters, and 33 without; of 31 that asked what the text is about 8 and 12."""
FIRST = 6
"""Passages that attention alone names, before a question's words are asked."""
FAINT, LOUD = 0.1, 2.0
"""What is added to a preference before its logarithm is taken, and how much words weigh beside that. Chosen on the TUNE
split, as `FIRST` was: of 60 facts of countries in 32k tokens 56 stand in the first 24 chunks, by attention alone 44."""
SURE = 4
"""Lines of a closer look that are chosen before what they lead to."""
SENTENCE = 240
"""Characters at most by which a passage grows on each side, to where a sentence begins or ends."""
ENDS = re.compile(r"[.!?。！？][\"'”’)]*\s+|\n\s*")


@dataclass(frozen=True)
class Passages:
    """What is to be read again."""

    sources: list[Source]
    """Passages in the order of the texts, one source for each file that has some."""
    best: list[Evidence]
    """The passages that stand out most, best first."""
    pieces: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Of each source, what it is put together from: first character there, first character in the text, length."""

    rarity: Tensor | None = None
    """How rare the question's words (W,) are in the texts; None where nobody asked."""

    def original(self, found: Evidence) -> Evidence | None:
        """Evidence of these passages, told by its place in the texts; None where it is not of them."""
        for source, pieces in zip(self.sources, self.pieces, strict=False):
            if source.name != found.file or source.text[found.start : found.end] != found.text:
                continue
            held = [(max(at, found.start), min(at + length, found.end), first - at) for at, first, length in pieces]
            start, end, shift = max(held, key=lambda one: one[1] - one[0], default=(0, 0, 0))
            if end > start:
                return replace(found, start=start + shift, end=end + shift, text=source.text[start:end])
        return None


def preference(asked: Record, neutral: Tensor, *, least: float | None = None) -> Tensor:
    """How much more a question attends to each chunk (C,) than the neutral one: a ratio of shares of attention.

    Chunk 0, which is always open, has 0. Empty where the question opened nothing, or singles nothing out.

    Args:
        neutral: the `shares` of the neutral question, of as many chunks or not.
        least: a preference that some chunk must have; `DISTINCT` if not given.
    """
    own = shares(asked)
    chunks = len(own)
    if not chunks:
        return torch.zeros(0)
    score = own / (pad(neutral, (0, max(0, chunks - len(neutral))))[:chunks] + SLACK / chunks)
    return score if float(score.max()) >= (DISTINCT if least is None else least) else score[:0]


def shares(record: Record) -> Tensor:
    """The part of a question's attention that each chunk (C,) gets in the middle layers, in float64; chunk 0, which is
    always open, has none."""
    masses = [mass for _, mass in sorted(record.mass.items())]
    first, last = (int(part * len(masses)) for part in MIDDLE)
    total = torch.zeros(max((mass.shape[1] for mass in masses), default=0), dtype=torch.float64)
    for mass in masses[first : max(last, first + 1)]:
        total[: mass.shape[1]] += mass.sum(0).double()
    total[:1] = 0
    return total / total.sum().clamp_min(1e-12)


def passages(
    score: Tensor,
    places: Places,
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    chunk: int,
    tokens: int,
    recent: tuple[int, int],
    order: Iterable[int] | None = None,
    count: int = 3,
) -> Passages:
    """The passages of the best chunks, whole sentences of about `tokens` tokens in all, headings of their sections
    included, and the end of the texts.

    Args:
        score: of each chunk (C,), by `preference`.
        order: the chunks, best first; by `score` if not given.
        sources: the texts that `places` tells of.
        chunk: tokens of a chunk.
        recent: first and last token (exclusive) of what the question reads in full anyway; it is read again as well.
        count: passages that are shown as evidence.
    """
    taken = _Taken(tokenizer)
    for first in range(*recent, chunk):
        taken.add(places.place(first, min(first + chunk, recent[1])))
    room, whole = taken.tokens + tokens, float(score.sum())
    best: list[Evidence] = []
    for number in _order(score) if order is None else order:
        if taken.tokens >= room:
            break
        found = taken.add(places.place(number * chunk, (number + 1) * chunk))
        if found is not None and len(best) < count:
            source, start, end = found
            share = round(float(score[number]) / whole, 4) if number < len(score) and whole else 0.0
            best.append(Evidence(source.name, start, end, source.text[start:end], share))
    texts = list(taken.texts(sources))
    return Passages([source for source, _ in texts], best, [pieces for _, pieces in texts])


def best_first(score: Tensor, words: Tensor, linked: Iterable[int] = ()) -> Iterator[int]:
    """Chunks, best first, none twice, and none of which neither attention nor words say anything.

    The first few are those of attention alone: a question may be put in other words than its answer. Then, by turns,
    the best by both together, the best by words, and those to which these lead (`linked`).
    """
    turns = zip_longest(_order(together(score, words, LOUD)), _order(words), linked)
    others = (number for some in turns for number in some if number is not None)
    yield from dict.fromkeys((*_order(score)[:FIRST], *others))


def best_together(score: Tensor, words: Tensor, linked: Iterable[int] = ()) -> list[int]:
    """Chunks of which attention or words say anything, best first by both together, which count alike; after the first
    few, by turns with those to which these lead (`linked`)."""
    best = _order(together(score, words, 1.0))
    turns = zip_longest(best[SURE:], linked)
    return list(dict.fromkeys((*best[:SURE], *(number for some in turns for number in some if number is not None))))


def together(score: Tensor, words: Tensor, loud: float) -> Tensor:
    """Positive for chunks of which attention or words say anything, the higher the more: the logarithm of a preference
    and, `loud` times, how well the words match."""
    size = min(len(score), len(words))
    if not size:
        return torch.zeros(0)
    both = torch.log(score[:size] + FAINT) + loud * words[:size]
    return (both - both.min() + 1) * ((score[:size] > 0) | (words[:size] > 0))


def _order(score: Tensor) -> list[int]:
    """Places of positive scores, the highest first."""
    order = score.argsort(descending=True, stable=True)
    return [int(number) for number in order[score[order] > 0]]


class _Taken:
    """Stretches of texts that grow together where they touch."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self.tokens = 0
        """Tokens of all of them, those of overlaps counted as often as they were taken."""

    def add(self, place: tuple[Source, int, int] | None) -> tuple[Source, int, int] | None:
        """Takes the sentences around a place; tells which, or None where there is nothing new."""
        if place is None:
            return None
        source, (start, end) = place[0], whole_sentences(place[0].text, *place[1:])
        if not self._take(source, start, end):
            return None
        named = heading(source.text, start)
        if named is not None:
            self._take(source, *named)
        return source, start, end

    def _take(self, source: Source, start: int, end: int) -> bool:
        spans = self._spans.setdefault(id(source), [])
        if any(first <= start and end <= last for first, last in spans):
            return False
        spans[:] = _merged([*spans, (start, end)])
        self.tokens += len(self._tokenizer(source.text[start:end], add_special_tokens=False).input_ids)
        return True

    def texts(self, sources: Sequence[Source]) -> Iterator[tuple[Source, list[tuple[int, int, int]]]]:
        """What was taken, in the order of the texts, with an empty line between sections; and of which pieces."""
        for source in sources:
            text, before, pieces = "", None, []
            for start, end in self._spans.get(id(source), []):
                piece, named = source.text[start:end].strip(), heading(source.text, start)
                if not piece:
                    continue
                if text:
                    text += "\n" if named is not None and named == before else "\n\n"
                pieces.append((len(text), source.text.index(piece, start), len(piece)))
                text, before = text + piece, heading(source.text, end - 1)
            if text:
                yield Source(source.name, text), pieces


def whole_sentences(text: str, start: int, end: int) -> tuple[int, int]:
    """Grows a stretch to where its first sentence begins and its last one ends, if that is near."""
    before = [found.end() for found in ENDS.finditer(text, max(0, start - SENTENCE), start)]
    after = ENDS.search(text, end, end + SENTENCE)
    return (before[-1] if before else start), (after.end() if after else end)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
