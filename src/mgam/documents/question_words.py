"""The words of a question in a text: which chunks hold them, or stand in a section whose heading does.

A passage that answers often shares with its question only what is asked for; of whom it speaks was said in the heading
of its section. So a heading's words count for each chunk of its section.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mgam.documents.evidence import Places
from mgam.documents.headings import headings
from mgam.documents.sources import Source

REPEATED = 0.3
"""How much a word adds when it is repeated: chosen on the TUNE split (facts of countries, of 0 to 1)."""
WORD = re.compile(r"\w+")
COMMON = frozenset(
    WORD.findall(
        """
    a an the this that these those there here it its i me my we us our you your he him his she her they them their
    what which who whom whose when where why how is are was were be been being am do does did done have has had
    can could will would shall should may might must not no nor and or but if then than as so too also very
    of in on at to for from with without by about into onto over under up down out off between among through
    any some all each every only just exactly according please answer answers
    """
    )
)
"""English words by which questions are put, whatever they ask for. In a text of facts they are rarer than any name, so
rarity alone would go by them: with them a fact of 60 (countries in 32k tokens, TUNE split) stands among the first four
chunks by words for 23, without them for 59. In capitals alone they may be names (WHO, US) and count."""
Stretch = tuple[int, int, int]
"""A chunk's characters in its text, start and end (exclusive), and its number."""


@dataclass(frozen=True)
class Matches:
    """How well each chunk (C,) matches a question's words, in float64, and how rare these words (W,) are."""

    score: Tensor
    rarity: Tensor


def matches(
    question: str, places: Places, sources: Sequence[Source], chunks: int, chunk: int, rarity: Tensor | None = None
) -> Matches:
    """How well chunks match the words of a question, as in BM25 (Robertson and Walker 1994): rare words weigh more,
    words of half of the chunks and those by which questions are put (`COMMON`) nothing, and a repeated word ever less.

    Args:
        sources: the texts that `places` tells of.
        chunk: tokens of a chunk.
        rarity: how rare the words are in a longer text of which this is a part: a few passages that answer are no
            measure, for what they all speak of is common there, and "is" and "the" may be rare.
    """
    words = asked_words(question)
    if not words or not chunks:
        return Matches(torch.zeros(chunks, dtype=torch.float64), torch.zeros(len(words), dtype=torch.float64))
    told = stretches(places, chunks, chunk)
    counts = torch.zeros(len(words), chunks, dtype=torch.float64)
    for source in sources:
        _count(source.text, told.get(id(source), []), words, counts)
    if rarity is None:
        among = (counts > 0).sum(1).double()
        rarity = torch.log((chunks - among + 0.5) / (among + 0.5)).clamp_min(0)
    return Matches(((counts / (counts + REPEATED)) * rarity[:, None]).sum(0), rarity)


def asked_words(question: str) -> list[str]:
    """The words of a question that are looked for."""
    return [word for word in dict.fromkeys(WORD.findall(question)) if not is_common(word)]


def is_common(word: str) -> bool:
    """Whether a word says nothing of what is asked for."""
    return word.casefold() in COMMON and (len(word) == 1 or not word.isupper())


def stretches(places: Places, chunks: int, chunk: int) -> dict[int, list[Stretch]]:
    """Where the first `chunks` chunks of so many tokens stand, by the `id` of their source."""
    told: dict[int, list[Stretch]] = {}
    for number in range(chunks):
        found = places.place(number * chunk, (number + 1) * chunk)
        if found is not None:
            told.setdefault(id(found[0]), []).append((found[1], found[2], number))
    return told


def _count(text: str, told: list[Stretch], words: Sequence[str], counts: Tensor) -> None:
    """Adds to counts (W, C) how often each word stands in each chunk of a text, or in the heading of its section."""
    if not told:
        return
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    number = {word.casefold(): place for place, word in enumerate(words)}
    starts = [start for start, _, _ in told]

    def at(place: int) -> int:
        return told[max(0, bisect_right(starts, place) - 1)][2]

    def standing(start: int, end: int) -> Iterator[tuple[int, int]]:
        """Words and places; letters that are alike but for their case may make another word, which does not count."""
        for found in wanted.finditer(text, start, end):
            word = number.get(found[0].casefold())
            if word is not None:
                yield word, found.start()

    own = [word * counts.shape[1] + at(place) for word, place in standing(0, len(text))]
    counts += torch.bincount(torch.tensor(own, dtype=torch.int64), minlength=counts.numel()).view_as(counts)
    bounds = [start for start, _ in headings(text)]
    for (start, end), (first, last) in zip(headings(text), pairwise([*bounds, len(text)]), strict=True):
        for word in {word for word, _ in standing(start, end)}:
            counts[word, at(first) : at(max(first, last - 1)) + 1] += 1
