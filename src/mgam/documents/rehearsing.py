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
from mgam.documents.tokens import Places

if TYPE_CHECKING:
    from mgam.documents.document import Document

QUESTIONS = ("?", " ".join([NEUTRAL] * 2), " ".join([NEUTRAL] * 6))
"""Kernels read blocks of up to 16 queries, of up to 32, and several blocks."""
NEW_TOKENS = 4
"""Of an answer: the first comes with the question, the second is read as it is, the third by a captured call."""


def rehearse(document: Document, reread: int) -> None:
    """Prepares a digest for questions; the open document is as it was before.

    Args:
        reread: tokens that askers will read a second time; 0: none.

    Raises:
        DigestError: a page that was needed is damaged, or the disk is full.
    """
    if len(document.tokens) >= document.manifest.dense_until:
        document.neutral(keep=True)
    if document.model.device.type == "cuda":
        ask_once(document, reread)
    document.start(0)


def ask_once(document: Document, reread: int) -> None:
    """Asks short and long questions at first sight, and at second sight where passages are read again, for nothing."""
    border, window = len(document.tokens), document.settings.window
    place = Places(document.tokens, document.sources).place(0, reread + window) if reread else None
    for question in QUESTIONS:
        seen = document.attended(question)
        document.generate(question, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        if place is not None and border >= document.manifest.dense_until:
            source, start, end = place
            again = Passages([Source(source.name, source.text[start:end])], [])
            at_second_sight(
                document.model, document.tokenizer, again, question, seen, 1, NEW_TOKENS, None, least=NEW_TOKENS
            )
