"""Texts that were read, ready for questions: what is asked of them, and what a question attends to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mgam.documents.evidence import Places
from mgam.documents.prompt import Prompt
from mgam.documents.question_words import matches
from mgam.documents.references import linked
from mgam.documents.second_look import NEUTRAL, Passages, best_first, passages, preference, shares
from mgam.documents.sources import Source
from mgam.documents.tokens import Frame
from mgam.integrations.transformers import Applied, PyramidCache
from mgam.integrations.transformers.call_size import call_size
from mgam.record import Record
from mgam.schedule import Schedule


@dataclass
class ReadTexts:
    """Texts that were read, ready for one question after the other."""

    ids: list[int]
    """Tokens of instructions and texts."""
    cache: Any
    applied: Applied | None
    record: Record
    """What reading the texts cost."""
    place: Any = None
    """Where the texts end, to go back to; None when only one question is asked, and that at first sight."""
    neutral: Tensor | None = None
    """Shares of attention of a question that asks for nothing; found when they are needed."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Any,
        prompt: Prompt,
        room: int,
        record: Record,
        *,
        keep: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> ReadTexts:
        applied: Applied | None = getattr(model, "_mgam_applied", None)
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        if applied is not None:
            cache = PyramidCache(model, [_schedule(applied, prompt)], reserve=room)
            cache.watch(record)
        ids = torch.tensor([prompt.ids[: prompt.document]], device=model.device)
        _read_document(model, ids, cache, prompt.document, on_progress)
        keep = keep or (applied is not None and applied.settings.reread > 0)
        place = cache.bookmark() if keep and applied is not None else None
        return cls(prompt.ids[: prompt.document], cache, applied, record, place)

    def turn_to(self, prompt: Prompt, *, again: bool) -> tuple[Any, Record | None]:
        """The cache after the texts, for this question, and a record that begins with what reading them cost."""
        if self.applied is None:
            return (copy.deepcopy(self.cache) if again else self.cache), None
        if self.place is not None:
            self.cache.go_back(self.place)
        record = copy.deepcopy(self.record)
        self.cache.watch(record)
        for layer in self.cache.pyramids.values():
            layer.schedules = [_schedule(self.applied, prompt)]
        return self.cache, record

    def look(self, model: Any, tokenizer: Any, prompt: Prompt, count: int) -> tuple[Record, Passages] | None:
        """What a first look at a question saw, and what is to be read again; None where there is no second look."""
        applied = self.applied
        if applied is None or not applied.settings.reread or prompt.document < applied.reading.dense_until:
            return None
        seen = self.attended(model, prompt)
        if not seen.mass:
            return None
        if self.neutral is None:
            self.neutral = self.of_nothing(model, tokenizer, prompt)
        places, sources, border = prompt, prompt.sources, prompt.document
        chosen = chosen_again(applied, seen, self.neutral, prompt.asked, places, sources, tokenizer, border, count)
        return None if chosen is None else (seen, chosen)

    def attended(self, model: Any, prompt: Prompt) -> Record:
        """What a question attends to; no answer is made. Only where the model reads multi-granularly."""
        cache, seen = self.turn_to(prompt, again=True)
        assert seen is not None
        read_question(model, cache, prompt.ids[prompt.document :], prompt.document)
        return seen

    def of_nothing(self, model: Any, tokenizer: Any, prompt: Prompt) -> Tensor:
        """Shares of attention (C,) of a question that asks for nothing."""
        asked = Frame.of(tokenizer).question(tokenizer, NEUTRAL)
        return shares(self.attended(model, replace(prompt, ids=[*self.ids, *asked])))


def read_question(model: Any, cache: Any, ids: list[int], first: int) -> None:
    """Reads a question after the texts, without logits."""
    with torch.no_grad():
        asked = torch.tensor([ids], device=model.device)
        places = torch.arange(first, first + len(ids), device=model.device)[None]
        model.get_decoder()(input_ids=asked, position_ids=places, past_key_values=cache, use_cache=True)


def chosen_again(
    applied: Applied,
    seen: Record,
    neutral: Tensor,
    question: str,
    places: Places,
    sources: Sequence[Source],
    tokenizer: Any,
    border: int,
    count: int,
) -> Passages | None:
    """What is read again of texts that end at token `border`; None where the question singles nothing out."""
    score = preference(seen, neutral)
    if not score.numel():
        return None
    settings = applied.settings
    chunk = settings.pyramid_levels.chunk
    recent = max(0, border - settings.window) // chunk * chunk, border
    words = matches(question, places, sources, border // chunk, chunk)
    order = best_first(score, words.score, linked(question, words, places, sources, chunk))
    found = passages(
        score, places, sources, tokenizer, chunk=chunk, tokens=settings.reread, recent=recent, order=order, count=count
    )  # fmt: skip
    return replace(found, rarity=words.rarity)


def _schedule(applied: Applied, prompt: Prompt) -> Schedule:
    settings = applied.settings
    return Schedule.reading(
        prompt.document,
        prompt.question,
        block=settings.block,
        question_block=settings.question_block,
        lookahead=settings.lookahead,
    )


def _read_document(
    model: Any, ids: Tensor, cache: Any, document: int, on_progress: Callable[[int, int], None] | None
) -> None:
    """Reads all but the question, without logits."""
    decoder = model.get_decoder()
    size = call_size(model)
    for first in range(0, document, size):
        last = min(first + size, document)
        positions = torch.arange(first, last, device=ids.device)[None]
        decoder(input_ids=ids[:, first:last], position_ids=positions, past_key_values=cache, use_cache=True)
        if on_progress is not None:
            on_progress(last, document)
