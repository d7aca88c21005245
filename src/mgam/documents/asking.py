"""Asking a question of documents: reads them in calls of bounded size, answers, and shows what the answer rests on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from mgam.documents.chart import Chart
from mgam.documents.closer_look import closer
from mgam.documents.confidence import Watch, confidence, is_found
from mgam.documents.evidence import Evidence, find_evidence
from mgam.documents.prompt import Prompt, build
from mgam.documents.read_texts import ReadTexts
from mgam.documents.second_look import Passages
from mgam.documents.sources import Source
from mgam.errors import DocumentError
from mgam.integrations.memory import peak_memory_bytes
from mgam.integrations.transformers import Applied
from mgam.integrations.transformers.apply import applied_to
from mgam.record import Record


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
    memory: ReadTexts | None = None
    for number, prompt in enumerate(prompts):
        begin = time.perf_counter()
        if memory is None or prompt.ids[: prompt.document] != memory.ids:
            record = Record(evidence_from=prompt.document) if on_chart is None else Chart(evidence_from=prompt.document)
            memory = ReadTexts.of(model, prompt, room, record, keep=len(prompts) > 1, on_progress=on_progress)
        read = time.perf_counter()
        looked = memory.look(model, tokenizer, prompt, evidence_count) if again else None
        if looked is not None:
            first, chosen = looked
            until = time.perf_counter() - read
            answer = at_second_sight(
                model, tokenizer, chosen, prompt.asked, first, len(prompt.ids), max_new_tokens, on_text
            )
            answer = replace(answer, tokens={**answer.tokens, "document": prompt.document})
            answering = time.perf_counter() - read
            seconds = {
                "reading": round(read - begin, 3),
                "to the first token": round(min(until + first_token(answer), answering), 3),
                "answering": round(answering, 3),
            }
            answer = replace(answer, seconds=seconds)
            if on_chart is not None and isinstance(first, Chart):
                on_chart(first, prompt, answer)
            yield answer
            continue
        cache, seen = memory.turn_to(prompt, again=number + 1 < len(prompts))
        said = say(model, tokenizer, prompt, cache, max_new_tokens, on_text, least)
        done = time.perf_counter()
        applied = memory.applied
        evidence: list[Evidence] = []
        if applied and seen:
            evidence = find_evidence(seen, prompt, applied.settings.pyramid_levels, evidence_count)
        answer = Answer(
            answer=said.answer,
            evidence=evidence,
            entries_per_level=per_level(seen, applied),
            tokens={"document": prompt.document, "question": prompt.question, "answer": said.tokens},
            seconds={
                "reading": round(read - begin, 3),
                "to the first token": round((said.first or done) - read, 3),
                "answering": round(done - read, 3),
            },
            peak_memory_bytes=peak_memory_bytes(),
            settings=settings_of(model, applied),
            confidence=said.confidence,
            found=is_found(said.confidence),
        )
        if on_chart is not None and isinstance(seen, Chart):
            on_chart(seen, prompt, answer)
        yield answer


@dataclass(frozen=True)
class Said:
    """What a model said."""

    answer: str
    tokens: int
    confidence: float | None
    first: float | None
    """When the first token came, by `time.perf_counter`."""


def say(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    cache: Any,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
    least: int,
) -> Said:
    """Answers a prompt greedily, given the cache after its texts."""
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
    new = produced[0, ids.shape[1] :]
    sure = confidence(model, tokenizer, prompt.asked, new, watch)
    return Said(tokenizer.decode(new, skip_special_tokens=True).strip(), int(new.shape[0]), sure, streamer.first)


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
    """The answer from passages alone, of at least `least` tokens: from all of them or from some of their lines,
    whichever rests on them most. Entries are those of all looks, of which the first took `tokens` queries."""
    begin, applied = time.perf_counter(), applied_to(model)
    short = build(tokenizer, chosen.sources, question)

    def answered(prompt: Prompt, shown: Callable[[str], None] | None) -> Answer:
        one = _answers(model, tokenizer, [prompt], max_new_tokens, None, shown, None, 0, again=False, least=least)
        return next(one)

    close = closer(
        model, tokenizer, short, max_new_tokens,
        lambda prompt, cache: say(model, tokenizer, prompt, cache, max_new_tokens, None, least), len(chosen.best),
        chosen.rarity,
    )  # fmt: skip
    looks = [(per_level(first, applied), float(tokens))]
    if close is None or not close.lines:
        answer, evidence = answered(short, on_text), chosen.best
        read = {**answer.tokens, "read again": short.document}
        looks.append((answer.entries_per_level, float(sum(answer.tokens.values()))))
        ready = begin + first_token(answer)
    else:
        answers = [answered(build(tokenizer, some.sources, question), None) for some in close.lines]
        looks += [(one.entries_per_level, float(sum(one.tokens.values()))) for one in answers]
        spent = close.record
        looks.append(({"1": spent.entries[0] / spent.queries}, spent.queries / len(applied.layers)))
        whole = replace(
            answers[0], answer=close.whole.answer, confidence=close.whole.confidence,
            tokens={"document": short.document, "question": short.question, "answer": close.whole.tokens},
        )  # fmt: skip
        answers = [whole, *answers]
        best = max(range(len(answers)), key=lambda number: answers[number].confidence or 0.0)
        answer, lines = answers[best], close.lines[max(0, best - 1)]
        evidence = [one for one in map(chosen.original, lines.best) if one is not None] or chosen.best
        read = {**answer.tokens, "read again": short.document, "answered from": answer.tokens["document"]}
        ready = time.perf_counter()
        if on_text is not None and answer.answer:
            on_text(answer.answer)
    queries = sum(count for _, count in looks)
    entries = {
        size: round(sum(some.get(size, 0.0) * count for some, count in looks) / queries, 1) for size in looks[0][0]
    }
    done = time.perf_counter()
    seconds = {
        "reading": 0.0, "to the first token": round(ready - begin, 3), "answering": round(done - begin, 3)
    }  # fmt: skip
    found = is_found(answer.confidence, again=True)
    return replace(answer, evidence=evidence, entries_per_level=entries, tokens=read, seconds=seconds, found=found)


def first_token(answer: Answer) -> float:
    """Seconds from the beginning of an answer's reading to its first token."""
    return answer.seconds["reading"] + answer.seconds["to the first token"]


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
