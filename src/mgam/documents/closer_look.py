"""A closer look: of the passages that a second look reads, the lines that stand out most answer the question.

Among a few dozen passages, each read in full, attention tells one line from the next far better than it did among
thousands. A small model answers better from five lines than from a hundred, if the right one is among them; so it
answers from all passages and from few lines, and the answer that rests most on what was read counts
(`mgam.documents.confidence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mgam.documents.prompt import Prompt
from mgam.documents.question_words import matches
from mgam.documents.read_texts import ReadTexts
from mgam.documents.references import linked
from mgam.documents.second_look import Passages, best_together, passages, preference
from mgam.integrations.transformers import Applied
from mgam.record import Record

CHUNK = 16
"""Tokens of which the attention is told: about a line."""
WIDTHS = (256, 64)
"""Tokens that are left, most first; lines are chosen for each. Chosen on the TUNE split, of one or two numbers."""
Said = TypeVar("Said")


@dataclass(frozen=True)
class Close(Generic[Said]):
    """What is left of a text, what was said from all of it, and what reading it in full cost."""

    lines: list[Passages]
    """One for each of `WIDTHS`."""
    whole: Said
    record: Record


@torch.no_grad()
def closer(
    model: Any, tokenizer: Any, short: Prompt, room: int, say: Callable[[Prompt, Any], Said], count: int = 3,
    rarity: Tensor | None = None,
) -> Close[Said] | None:  # fmt: skip
    """The lines of a short text that stand out most, by what its question attends to and by its words; None where the
    text is hardly longer, or longer than the model was trained to read in full.

    Args:
        room: tokens that an answer may have.
        say: answers a prompt, given the cache after its texts.
        count: lines that are shown as evidence.
        rarity: how rare the question's words (W,) are in the texts that the short one is of.
    """
    applied: Applied | None = getattr(model, "_mgam_applied", None)
    if applied is None or not 2 * WIDTHS[0] <= short.document <= len(short.ids) <= applied.trained_window:
        return None
    with applied.in_full(CHUNK):
        record = Record(evidence_from=short.document)
        memory = ReadTexts.of(model, short, len(short.ids) + room, record, keep=True, on_progress=None)
        score = preference(memory.attended(model, short), memory.of_nothing(model, tokenizer, short), least=0.0)
        cache, spent = memory.turn_to(short, again=False)
        whole = say(short, cache)
    assert spent is not None
    end = short.document, short.document
    words = matches(short.asked, short, short.sources, len(score), CHUNK, rarity)
    order = best_together(score, words.score, linked(short.asked, words, short, short.sources, CHUNK))
    lines = [
        passages(
            score, short, short.sources, tokenizer, chunk=CHUNK, tokens=tokens, recent=end, order=order, count=count
        )
        for tokens in WIDTHS
    ]
    return Close([some for some in lines if some.sources], whole, spent)
