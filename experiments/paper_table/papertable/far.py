"""A tale whose question stands far from what it asks for: as a unit of the document, and nowhere else.

In the other tasks every token may find the question near it: it opens each sample, and all models read that. Here a
token finds out only by reading afar whether it is asked for.
"""

from __future__ import annotations

import numpy as np

from papertable import tale
from papertable.sample import ASKED, NoAnswerError, Piece, Sample, assemble, room
from papertable.shelf import Part, Shelf

APART, SHARE = 1024, 4
"""Tokens between question and evidence at least, or this share of shorter samples."""


def draw(shelf: Shelf, part: Part, length: int, rng: np.random.Generator) -> Sample:
    """A tale with its question among the sentences, at a drawn place.

    Raises:
        NoAnswerError: when the part holds no sentence that may be asked for so far from its question.
    """
    for _ in range(50):
        question, pieces = tale.asked(shelf, part, room(length) - ASKED - 1, rng)
        begins = np.cumsum([0, *(len(piece.tokens) + 1 for piece in pieces)])
        gold = next(number for number, piece in enumerate(pieces) if piece.gold)
        far, there = min(APART, length // SHARE), begins[:-1]
        places = np.flatnonzero((there <= begins[gold] - far) | (there >= begins[gold + 1] + far))
        if len(places):
            at = int(rng.choice(places))
            planted = Piece(np.array(question[:ASKED], dtype=np.int32), asked=True)
            return assemble("far", (), [*pieces[:at], planted, *pieces[at:]], length)
    raise NoAnswerError(f"no sentence of the {part} part stands {far} tokens from a question in {length} tokens")
