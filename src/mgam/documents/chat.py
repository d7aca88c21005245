"""A talk about a digest: several questions, each of which sees what was said before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from mgam.documents.asking import Answer, Streamer, at_second_sight, first_token, per_level, settings_of
from mgam.documents.confidence import Watch, confidence, is_found
from mgam.documents.evidence import find_evidence
from mgam.documents.second_look import Passages
from mgam.documents.tokens import Frame, Places, encode
from mgam.integrations.memory import peak_memory_bytes
from mgam.integrations.transformers.apply import applied_to
from mgam.record import Record
from mgam.schedule import Span

if TYPE_CHECKING:
    from mgam.documents.document import Document


@dataclass
class Chat:
    """A talk about a document."""

    document: Document
    ids: list[int] = field(default_factory=list)
    """Tokens of all that was said, after the texts."""
    spans: tuple[Span, ...] = ()

    def say(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
        evidence_count: int = 3,
    ) -> Answer:
        """Answers the next question."""
        document = self.document
        model, tokenizer = document.model, document.tokenizer
        frame = Frame.of(tokenizer)
        begin = time.perf_counter()
        looked = None if self.ids else document.look(question, evidence_count)
        if looked is not None:
            return self._say_at_second_sight(question, *looked, max_new_tokens, on_text, begin)
        asked = frame.next_question(tokenizer, question) if self.ids else frame.question(tokenizer, question)
        ids = [*self.ids, *asked]
        spans = (*self.spans, document.question(len(ids)))
        record = Record(evidence_from=len(document.tokens) + len(self.ids))
        document.cache.watch(record)
        streamer, watch = Streamer(tokenizer, on_text), Watch()
        try:
            new = document.continue_from(
                ids, spans, owner=self, max_new_tokens=max_new_tokens, streamer=streamer,
                logits_processor=watch.as_list(),
            )  # fmt: skip
        finally:
            document.cache.watch(None)
        sure = confidence(model, tokenizer, question, torch.tensor(new, device=model.device), watch)
        done = time.perf_counter()
        self._remember(ids, spans, new)
        applied = applied_to(model)
        return Answer(
            answer=tokenizer.decode(new, skip_special_tokens=True).strip(),
            evidence=find_evidence(
                record, Places(document.tokens, document.sources), applied.reading.levels, evidence_count
            ),
            entries_per_level=per_level(record, applied),
            tokens={"document": len(document.tokens), "question": len(asked), "answer": len(new)},
            seconds={
                "to the first token": round((streamer.first or done) - begin, 3),
                "answering": round(done - begin, 3),
            },
            peak_memory_bytes=peak_memory_bytes(),
            settings=settings_of(model, applied),
            confidence=sure,
            found=is_found(sure),
        )

    def _say_at_second_sight(
        self,
        question: str,
        seen: Record,
        chosen: Passages,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None,
        begin: float,
    ) -> Answer:
        """The first answer of a talk, from passages alone; later ones see it after the whole texts."""
        document = self.document
        tokenizer, border = document.tokenizer, len(document.tokens)
        asked = Frame.of(tokenizer).question(tokenizer, question)
        looked = time.perf_counter()
        answer = at_second_sight(document.model, tokenizer, chosen, question, seen, len(asked), max_new_tokens, on_text)
        answering = time.perf_counter() - begin
        said = encode(tokenizer, answer.answer) if answer.answer else []
        self.ids = [*asked, *said]
        spans = (document.question(len(asked)),)
        self.spans = (*spans, Span(border + len(self.ids), 1)) if said else spans
        return replace(
            answer,
            tokens={**answer.tokens, "document": border},
            seconds={
                "to the first token": round(min(looked - begin + first_token(answer), answering), 3),
                "answering": round(answering, 3),
            },
        )

    def _remember(self, ids: list[int], spans: tuple[Span, ...], new: list[int]) -> None:
        ends = self.document.model.generation_config.eos_token_id
        ending = ends if isinstance(ends, list) else [ends]
        said = new[:-1] if new and new[-1] in ending else new  # the template brings its own ending
        self.ids = [*ids, *said]
        stop = len(self.document.tokens) + len(self.ids)
        self.spans = (*spans, Span(stop, 1)) if said else spans
