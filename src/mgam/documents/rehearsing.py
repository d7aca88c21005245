"""Asking a digest once after it is made, and throwing the answers away.

On a GPU kernels are compiled when they are first called, for seconds. Triton keeps them on the disk: rehearsed by the
process that digests, they are there when somebody asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgam.documents.asking import at_second_sight
from mgam.documents.second_look import NEUTRAL, Passages
from mgam.documents.sources import Source

if TYPE_CHECKING:
    from mgam.documents.document import Document

CHARACTERS = 8192
"""Of a text that is read as passages of a second look are: some 2,000 tokens."""
NEW_TOKENS = 4
"""Of an answer: the first comes with the question, the second is read as it is, the third by a captured call."""


def rehearse(document: Document) -> None:
    """Asks at first and at second sight; the document is as it was before.

    Raises:
        DigestError: a page that was needed is damaged.
    """
    seen = document.attended(NEUTRAL)
    document.generate(NEUTRAL, max_new_tokens=NEW_TOKENS)
    longest = max(document.sources, key=lambda source: len(source.text))
    again = Passages([Source(longest.name, longest.text[:CHARACTERS])], [])
    at_second_sight(document.model, document.tokenizer, again, NEUTRAL, seen, 1, NEW_TOKENS, None)
    document.start(0)
