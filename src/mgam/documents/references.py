"""References: what one passage names and another one tells of.

The answer to a question may be a chain: the question names a value, a line gives this value to a name, another line
gives that name to the next. Neither a question's words nor what it attends to point to the later links. So the rare
words of the line that matches a question best are looked for elsewhere, then those of the lines that hold them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mgam.documents.evidence import Places
from mgam.documents.headings import headings
from mgam.documents.question_words import WORD, Matches, Stretch, asked_words, is_common, stretches
from mgam.documents.second_look import ENDS, whole_sentences
from mgam.documents.sources import Source

HOPS = 5
"""Links that are followed one after the other."""
LEADS = 2
"""Words of a line that are followed, the rarest first."""
RARE = 6
"""Chunks at most in which such a word stands. Of the 50 links of ten chains of variables in 32k tokens (TUNE split) all
stand among the first 12 chunks so, by a question's words alone 10; with 3 or 4 in place of 6, in a trial, 40."""
MOST = 6
"""Chunks at most that are found so."""


def linked(question: str, words: Matches, places: Places, sources: Sequence[Source], chunk: int) -> list[int]:
    """Chunks to which the best match of a question leads, nearest first.

    Args:
        words: how well each chunk matches the question's words.
        sources: the texts that `places` tells of.
        chunk: tokens of a chunk.
    """
    if not len(words.score) or not float(words.score.max()) > 0:
        return []
    told = stretches(places, len(words.score), chunk)
    weight = dict(zip(map(str.casefold, asked_words(question)), words.rarity.tolist(), strict=True))
    known = set(map(str.casefold, WORD.findall(question)))
    ends: list[tuple[int, str | None]] = [(int(words.score.argmax()), None)]
    found: list[int] = []
    seen = {ends[0][0]}
    for _ in range(HOPS):
        leads: dict[str, list[int]] = {}
        for number, by in ends:
            line = _line(places.place(number * chunk, (number + 1) * chunk), weight, by)
            if line is None:
                continue
            source, start, end = line
            seen.update(_chunks(told.get(id(source), []), start, end - 1))
            for word in dict.fromkeys(WORD.findall(source.text, start, end)):
                if word.casefold() in known or is_common(word) or len(word) < 2:
                    continue
                known.add(word.casefold())
                held = _chunks_with(word, told, sources)
                if held is not None:
                    leads[word] = held
        ends = []
        for word in sorted(leads, key=lambda word: len(leads[word]))[:LEADS]:
            others = [number for number in leads[word] if number not in seen]
            if others:
                best = max(others, key=lambda number: float(words.score[number]))
                seen.add(best)
                found.append(best)
                ends.append((best, word))
        if not ends or len(found) >= MOST:
            break
    return found[:MOST]


def _line(
    place: tuple[Source, int, int] | None, weight: dict[str, float], by: str | None
) -> tuple[Source, int, int] | None:
    """The sentence of a chunk that holds the word `by`, or else most of the question's words."""
    if place is None:
        return None
    source, text = place[0], place[0].text
    start, end = whole_sentences(text, *place[1:])
    cuts = [start, *(found.end() for found in ENDS.finditer(text, start, end)), end]

    def value(line: tuple[int, int]) -> tuple[bool, float]:
        held = set(WORD.findall(text, *line))
        return by in held, sum(weight.get(word, 0.0) for word in set(map(str.casefold, held)))

    return source, *max(pairwise(cuts), key=value)


def _chunks(stretch: list[Stretch], first: int, last: int) -> list[int]:
    """Chunks of a text that hold some of its characters, the last one included."""
    starts = [start for start, _, _ in stretch]
    return [one[2] for one in stretch[max(0, bisect_right(starts, first) - 1) : bisect_right(starts, last)]]


def _chunks_with(word: str, told: dict[int, list[Stretch]], sources: Sequence[Source]) -> list[int] | None:
    """Chunks in which a word stands as it is written, or in the heading of their section; None where more than `RARE`
    hold it."""
    held: set[int] = set()
    for source in sources:
        stretch = told.get(id(source), [])
        starts = [start for start, _, _ in stretch]
        for first, last in _standing(word, source.text):
            if starts and last > starts[0]:
                held.update(
                    one[2] for one in stretch[max(0, bisect_right(starts, first) - 1) : bisect_right(starts, last)]
                )
            if len(held) > RARE:
                return None
    return sorted(held)


def _standing(word: str, text: str) -> Iterator[tuple[int, int]]:
    """First and last character of what a word tells of: its own place, or the section whose heading it stands in."""
    found, bounds = text.find(word), headings(text)
    while found >= 0:
        end = found + len(word)
        if not (_letter(text[found - 1 : found]) or _letter(text[end : end + 1])):
            number = bisect_right(bounds, found, key=lambda one: one[0])
            if number and end <= bounds[number - 1][1]:
                yield found, bounds[number][0] - 1 if number < len(bounds) else len(text) - 1
            else:
                yield found, found
        found = text.find(word, end)


def _letter(text: str) -> bool:
    return WORD.match(text) is not None
