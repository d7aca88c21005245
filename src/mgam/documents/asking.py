"""Asking a question of documents: reads them in calls of bounded size, answers, and shows what the answer rests on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from mgam.documents.chart import Chart
from mgam.documents.confidence import Watch, confidence, is_found
from mgam.documents.evidence import Evidence, Places, find_evidence
from mgam.documents.prompt import Prompt, build
from mgam.documents.second_look import NEUTRAL, Passages, passages, preference, shares
from mgam.documents.sources import Source
from mgam.documents.tokens import Frame
from mgam.documents.words import matches
from mgam.engine import Record
from mgam.errors import DocumentError
from mgam.integrations.memory import peak_memory_bytes
from mgam.integrations.transformers import Applied, PyramidCache
from mgam.integrations.transformers.apply import applied_to
from mgam.integrations.transformers.call_size import call_size
from mgam.schedule import Schedule


@dataclass(frozen=True)
class Answer:
    """An answer and what it rests on."""

    answer: str
    evidence: list[Evidence]
    entries_per_level: dict[str, float]
    """Entries that a query read on average at each level, keyed by tokens per entry."""
    tokens: dict[str, int]
    """Tokens of `document`, `question` and `answer`."""
    seconds: dict[str, float]
    """Seconds spent `reading`, from then `to the first token`, and `answering` in all."""
    peak_memory_bytes: int
    settings: dict[str, Any]
    confidence: float | None = None
    """From 0 to 1: how far the answer rests on the texts (`mgam.documents.confidence`); None where it is not known."""
    found: bool | None = None
    """Whether the answer seems to stand in the texts: a hint, by a threshold on `confidence`."""


def ask(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    question: str,
    *,
    max_new_tokens: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    evidence_count: int = 3,
) -> Answer:
    """Answers a question from some texts, greedily.

    A model that `mgam.apply` was called on reads multi-granularly and gives evidence; any other reads densely, by the
    same calls, and gives none.

    Args:
        on_progress: called with tokens read so far and tokens in all.
        on_text: called with each piece of the answer as it is generated.

    Raises:
        DocumentError: for an empty question or no text.
    """
    answers = ask_each(
        model, tokenizer, sources, [question], max_new_tokens=max_new_tokens, on_progress=on_progress, on_text=on_text,
        evidence_count=evidence_count,
    )  # fmt: skip
    return next(answers)


def ask_each(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_chart: Callable[[Chart, Prompt, Answer], None] | None = None,
    evidence_count: int = 3,
) -> Iterator[Answer]:
    """Answers several questions from texts that are read once, one after the other; each as `ask` answers it alone.

    The time of reading is that of the first answer. `on_chart` is called with what was read at which level for each
    answer, where the model reads multi-granularly.

    Raises:
        DocumentError: for an empty question, no question or no text.
    """
    if not questions:
        raise DocumentError("no question was given; ask at least one")
    prompts = [build(tokenizer, sources, question) for question in questions]
    return _answers(model, tokenizer, prompts, max_new_tokens, on_progress, on_text, on_chart, evidence_count)


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None,
    on_text: Callable[[str], None] | None,
    on_chart: Callable[[Chart, Prompt, Answer], None] | None,
    evidence_count: int,
    again: bool = True,
    least: int = 0,
) -> Iterator[Answer]:
    """`again`: whether texts may be looked at a second time; `least`: tokens that an answer has at least."""
    room = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    memory: _Memory | None = None
    for number, prompt in enumerate(prompts):
        begin = time.perf_counter()
        if memory is None or prompt.ids[: prompt.document] != memory.ids:
            record = Record(evidence_from=prompt.document) if on_chart is None else Chart(evidence_from=prompt.document)
            memory = _Memory.of(model, prompt, room, record, keep=len(prompts) > 1, on_progress=on_progress)
        read = time.perf_counter()
        looked = memory.look(model, tokenizer, prompt, evidence_count) if again else None
        if looked is not None:
            first, chosen = looked
            until = time.perf_counter() - read
            answer = at_second_sight(
                model, tokenizer, chosen, prompt.asked, first, len(prompt.ids), max_new_tokens, on_text
            )
            answer = replace(answer, tokens={**answer.tokens, "document": prompt.document})
            seconds = {
                "reading": round(read - begin, 3),
                "to the first token": round(until + first_token(answer), 3),
                "answering": round(time.perf_counter() - read, 3),
            }
            answer = replace(answer, seconds=seconds)
            if on_chart is not None and isinstance(first, Chart):
                on_chart(first, prompt, answer)
            yield answer
            continue
        cache, seen = memory.turn_to(prompt, again=number + 1 < len(prompts))
        watch, streamer = Watch(), Streamer(tokenizer, on_text)
        ids = torch.tensor([prompt.ids], device=model.device)
        produced = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            min_new_tokens=least or None,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            logits_processor=watch.as_list(),
            streamer=streamer,
        )
        answer_ids = produced[0, ids.shape[1] :]
        sure = confidence(model, tokenizer, prompt.asked, answer_ids, watch)
        done = time.perf_counter()
        applied = memory.applied
        evidence: list[Evidence] = []
        if applied and seen:
            evidence = find_evidence(seen, prompt, applied.settings.pyramid_levels, evidence_count)
        answer = Answer(
            answer=tokenizer.decode(answer_ids, skip_special_tokens=True).strip(),
            evidence=evidence,
            entries_per_level=per_level(seen, applied),
            tokens={"document": prompt.document, "question": prompt.question, "answer": int(answer_ids.shape[0])},
            seconds={
                "reading": round(read - begin, 3),
                "to the first token": round((streamer.first or done) - read, 3),
                "answering": round(done - read, 3),
            },
            peak_memory_bytes=peak_memory_bytes(),
            settings=settings_of(model, applied),
            confidence=sure,
            found=is_found(sure),
        )
        if on_chart is not None and isinstance(seen, Chart):
            on_chart(seen, prompt, answer)
        yield answer


@dataclass
class _Memory:
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
    ) -> _Memory:
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
        cache, seen = self.turn_to(prompt, again=True)
        assert seen is not None
        read_question(model, cache, prompt.ids[prompt.document :], prompt.document)
        if not seen.mass:
            return None
        if self.neutral is None:
            asked = Frame.of(tokenizer).question(tokenizer, NEUTRAL)
            cache, neutral = self.turn_to(replace(prompt, ids=[*self.ids, *asked]), again=True)
            assert neutral is not None
            read_question(model, cache, asked, prompt.document)
            self.neutral = shares(neutral)
        places, sources, border = prompt, prompt.sources, prompt.document
        chosen = chosen_again(applied, seen, self.neutral, prompt.asked, places, sources, tokenizer, border, count)
        return None if chosen is None else (seen, chosen)


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
    return passages(
        score, places, sources, tokenizer, chunk=chunk, tokens=settings.reread, recent=recent, words=words, count=count
    )  # fmt: skip


def at_second_sight(
    model: Any,
    tokenizer: Any,
    chosen: Passages,
    question: str,
    first: Record,
    tokens: int,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
    *,
    least: int = 0,
) -> Answer:
    """The answer from passages alone, of at least `least` tokens. Entries are those of both looks, of which the first
    took `tokens` queries."""
    short = build(tokenizer, chosen.sources, question)
    answer = next(_answers(model, tokenizer, [short], max_new_tokens, None, on_text, None, 0, again=False, least=least))
    after = sum(answer.tokens.values())
    entries = {
        size: round((count * tokens + answer.entries_per_level.get(size, 0.0) * after) / (tokens + after), 1)
        for size, count in per_level(first, applied_to(model)).items()
    }
    read = {**answer.tokens, "read again": short.document}
    found = is_found(answer.confidence, again=True)
    return replace(answer, evidence=chosen.best, entries_per_level=entries, tokens=read, found=found)


def first_token(answer: Answer) -> float:
    """Seconds from the beginning of an answer's reading to its first token."""
    return answer.seconds["reading"] + answer.seconds["to the first token"]


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


def per_level(record: Record | None, applied: Applied | None) -> dict[str, float]:
    """Entries that a query read on average, keyed by tokens per entry."""
    if record is None or applied is None or not record.queries:
        return {}
    sizes = applied.settings.pyramid_levels.sizes
    return {str(size): round(count / record.queries, 1) for size, count in zip(sizes, record.entries, strict=True)}


def settings_of(model: Any, applied: Applied | None) -> dict[str, Any]:
    """What an answer depends on, as plain values."""
    values: dict[str, Any] = {"method": "dense"}
    if applied is not None:
        values = {
            **applied.settings.as_dict(),
            "dense_until": applied.reading.dense_until,
            "question_budget": applied.question_budget,
        }
    return {
        **values,
        "model": getattr(model, "name_or_path", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


class Streamer(TextStreamer):
    """Hands pieces of text on as they are generated, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._prompt = True
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then each token."""
        if not self._prompt and self.first is None:
            self.first = time.perf_counter()
        self._prompt = False
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes a piece of text."""
        if text and self._on_text is not None:
            self._on_text(text)
