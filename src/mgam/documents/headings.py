"""Headings: the line that says what a section of a text is about."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache

LONGEST = 100
"""Characters of a heading at most."""
_FIRST_LINE = re.compile(rf"(?:\A|\n[ \t]*\n)[ \t]*(\S[^\n]{{0,{LONGEST - 1}}})(?=\n)")
_PROSE = re.compile(r"[-–—.!?,;。！？，；][\"'”’)\]]*\s*\Z")
_GOES_ON = re.compile(r"\n[ \t]*[^\W\d_A-Z]")


@lru_cache(maxsize=4)
def headings(text: str) -> tuple[tuple[int, int], ...]:
    """Where headings stand in a text, in order: characters [start, end) of each.

    A heading is a line that begins a paragraph or stands alone, is short, and neither ends as a sentence does nor goes
    on in the next line.
    """
    found = (line for line in _FIRST_LINE.finditer(text) if not _PROSE.search(line[1]))
    return tuple(line.span(1) for line in found if not _GOES_ON.match(text, line.end(1)))


def heading(text: str, place: int) -> tuple[int, int] | None:
    """The heading of the section in which a character stands, which may stand in the heading itself; None before the
    first."""
    found = headings(text)
    number = bisect_right(found, place, key=lambda one: one[0])
    return found[number - 1] if number else None
