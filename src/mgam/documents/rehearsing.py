"""What is done for those who will ask, when a digest has been made.

What a question that asks for nothing attends to is kept, for every second look is set against it. And on a GPU the
digest is asked once, and the answers are thrown away: kernels are compiled when they are first called, for seconds, and
Triton keeps them on the disk.
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
    """Prepares a digest for questions; the open document is as it was before.

    Raises:
        DigestError: a page that was needed is damaged, or the disk is full.
    """
    if len(document.tokens) >= document.manifest.dense_until:
        document.neutral(keep=True)
    if document.model.device.type == "cuda":
        ask_once(document)
    document.start(0)


def ask_once(document: Document) -> None:
    """Asks a long and a short question at first sight, which kernels read in blocks of different sizes, and one at
    second sight, for nothing."""
    document.attended(" ".join([NEUTRAL] * 4))
    seen = document.attended(NEUTRAL)
    document.generate(NEUTRAL, max_new_tokens=NEW_TOKENS)
    longest = max(document.sources, key=lambda source: len(source.text))
    again = Passages([Source(longest.name, longest.text[:CHARACTERS])], [])
    at_second_sight(document.model, document.tokenizer, again, NEUTRAL, seen, 1, NEW_TOKENS, None)
