"""A closer look: of the passages that a second look reads, the lines that stand out most answer the question.

Among a few dozen passages, each read in full, attention tells one line from the next far better than it did among
thousands; the question's words count as much. A small model answers better from ten lines than from a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mgam.documents.prompt import Prompt
from mgam.documents.question_words import matches
from mgam.documents.read_texts import ReadTexts
from mgam.documents.second_look import Passages, best_together, passages, preference
from mgam.integrations.transformers import Applied
from mgam.record import Record

CHUNK = 16
"""Tokens of which the attention is told: about a line."""
TOKENS = 256
"""Tokens that are left. Chosen on the TUNE split, as were words beside attention."""


@dataclass(frozen=True)
class Close:
    """What is left of a text, and what reading it in full cost."""

    passages: Passages
    record: Record


@torch.no_grad()
def closer(model: Any, tokenizer: Any, short: Prompt, count: int = 3) -> Close | None:
    """The lines of a short text that stand out most by what its question attends to and by its words; None where the
    text is hardly longer, or longer than the model was trained to read in full."""
    applied: Applied | None = getattr(model, "_mgam_applied", None)
    if applied is None or not 2 * TOKENS <= short.document <= len(short.ids) <= applied.trained_window:
        return None
    with applied.in_full(CHUNK):
        room = 2 * len(short.ids) - short.document
        memory = ReadTexts.of(model, short, room, Record(evidence_from=short.document), keep=True, on_progress=None)
        seen = memory.attended(model, short)
        score = preference(seen, memory.of_nothing(model, tokenizer, short), least=0.0)
    end = short.document, short.document
    order = best_together(score, matches(short.asked, short, short.sources, len(score), CHUNK))
    chosen = passages(
        score, short, short.sources, tokenizer, chunk=CHUNK, tokens=TOKENS, recent=end, order=order, count=count
    )
    return Close(chosen, seen) if chosen.sources else None
