"""The words of a question in a text: which chunks hold them, or stand in a section whose heading does.

A passage that answers often shares with its question only what is asked for; of whom it speaks was said in the heading
of its section. So a heading's words count for each chunk of its section.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mgam.documents.evidence import Places
from mgam.documents.headings import headings
from mgam.documents.sources import Source

REPEATED = 0.3
"""How much a word adds when it is repeated: chosen on the TUNE split (facts of countries, of 0 to 1)."""
_WORD = re.compile(r"\w+")
_Chunk = tuple[int, int, int]
"""A chunk's characters in its text, start and end (exclusive), and its number."""


def matches(question: str, places: Places, sources: Sequence[Source], chunks: int, chunk: int) -> Tensor:
    """How well each chunk (C,) matches the words of a question, in float64, as in BM25 (Robertson and Walker 1994):
    rare words weigh more, words of half of the chunks nothing, and a word that is repeated adds ever less.

    Args:
        sources: the texts that `places` tells of.
        chunk: tokens of a chunk.
    """
    words = sorted({word.lower() for word in _WORD.findall(question)})
    score = torch.zeros(chunks, dtype=torch.float64)
    if not words or not chunks:
        return score
    number = {word: place for place, word in enumerate(words)}
    counts = torch.zeros(len(words), chunks, dtype=torch.float64)
    told: dict[int, list[_Chunk]] = {}
    for place in range(chunks):
        found = places.place(place * chunk, (place + 1) * chunk)
        if found is not None:
            told.setdefault(id(found[0]), []).append((found[1], found[2], place))
    for source in sources:
        for first, last, word in _standing(source.text, told.get(id(source), []), words):
            counts[number[word], first:last] += 1
    among = (counts > 0).sum(1).double()
    rarity = torch.log((chunks - among + 0.5) / (among + 0.5)).clamp_min(0)
    return ((counts / (counts + REPEATED)) * rarity[:, None]).sum(0)


def _standing(text: str, told: list[_Chunk], words: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Chunks [first, last) for which each occurrence of a word counts."""
    if not told:
        return
    wanted = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    starts = [start for start, _, _ in told]

    def at(place: int) -> int:
        return told[max(0, bisect_right(starts, place) - 1)][2]

    for found in wanted.finditer(text):
        yield at(found.start()), at(found.start()) + 1, found[0].lower()
    bounds = [start for start, _ in headings(text)]
    for (start, end), (first, last) in zip(headings(text), pairwise([*bounds, len(text)]), strict=True):
        for word in {found[0].lower() for found in wanted.finditer(text, start, end)}:
            yield at(first), at(max(first, last - 1)) + 1, word
