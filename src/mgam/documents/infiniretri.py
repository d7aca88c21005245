"""InfiniRetri: a text is read part by part, and what the question attends to is carried on (arXiv 2502.12962).

Only the rows of attention that the question needs are computed, in the last layer; sentences are known by their tokens
and never looked for again in a string.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mgam.documents import asking
from mgam.documents.evidence import Evidence
from mgam.documents.prompt import joined
from mgam.documents.sources import Source
from mgam.errors import DocumentError, SettingError
from mgam.integrations.transformers.apply import remove
from mgam.methods.infiniretri import Retrieval

NAME = "mgam-question-rows"
ENDS = re.compile(r"[.!?]\s+|[。！？｡]+[」』”’）]*\s*|\n\s*\n")
"""Where sentences end. Chinese and Japanese have no white space after their marks."""
SHORT = 8
"""Characters, with their full stop, that are no sentence by themselves: most are abbreviations."""
LONG = 500
"""Characters of a stretch without an end; a longer one is a table, a log or code, whose lines are taken instead."""
BLANK = re.compile(r"\s+")


@dataclass(frozen=True)
class Sentence:
    """A sentence, or a piece of one, by its tokens and the characters [start, end) of the text that they are of."""

    ids: tuple[int, ...]
    start: int
    end: int


def sentences(text: str, tokenizer: Any, most: int) -> list[Sentence]:
    """All of a text but white space by itself, in order; a sentence of more than `most` tokens comes in pieces.

    Raises:
        SettingError: a single character has more tokens than that.
    """
    found: list[Sentence] = []
    for start, end in _stretches(text):
        lines = text[start:end].splitlines(keepends=True) if end - start > LONG else [text[start:end]]
        for line in lines:
            found += _pieces(line, start, tokenizer, most)
            start += len(line)
    return found


def _stretches(text: str) -> Iterator[tuple[int, int]]:
    """Where a text's sentences stand, by their marks and by blank lines."""
    start = 0
    ends = list(ENDS.finditer(text))
    for end, following in zip_longest(ends, ends[1:]):
        mark, after = end.group(), text[end.end() : following.end() if following else len(text)]
        shortest = min(end.start() + 1 - start, len(after.strip()))
        if mark[0] != "." or "\n" in mark or shortest > SHORT:
            yield start, end.end()
            start = end.end()
    yield start, len(text)


def _pieces(text: str, start: int, tokenizer: Any, most: int) -> Iterator[Sentence]:
    """A text that begins at `start`, halved until no piece has more than `most` tokens: after white space, if any."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or not text.strip():
        return
    if len(ids) <= most:
        yield Sentence(tuple(ids), start, start + len(text))
        return
    if len(text) == 1:
        raise SettingError(f"{text!r} alone has {len(ids)} tokens; window and budget must both be as many or more")
    middle = len(text) // 2
    blank = BLANK.search(text, middle, middle + (len(text) - middle) // 2)
    cut = blank.end() if blank else middle
    yield from _pieces(text[:cut], start, tokenizer, most)
    yield from _pieces(text[cut:], start + cut, tokenizer, most)


def parts(items: Sequence[Sentence], window: int) -> list[list[Sentence]]:
    """Whole sentences packed into parts of at most `window` tokens."""
    packed: list[list[Sentence]] = []
    room = 0
    for item in items:
        if not packed or room < len(item.ids):
            packed.append([])
            room = window
        packed[-1].append(item)
        room -= len(item.ids)
    return packed


@dataclass(frozen=True)
class Found:
    """What is left when a text was read, and what that took."""

    sentences: list[Sentence]
    """In the order of the text."""
    scores: list[float]
    """Of each sentence: that of its best token, in the last part."""
    queries: int
    """Tokens read, over all parts."""
    entries: int
    """Keys that they read, summed."""


@torch.no_grad()
def retrieve(
    model: Any,
    tokenizer: Any,
    text: str,
    question: str,
    retrieval: Retrieval | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Reads the whole text part by part and keeps what the question attends to.

    Every call of the model is at most `window + budget` tokens and the question long.

    Args:
        on_progress: called with tokens of the text read so far, and all of them.

    Raises:
        DocumentError: for an empty text or question.
        SettingError: `window` or `budget` is less than the tokens of a single character.
    """
    dials = retrieval or Retrieval()
    items = sentences(text, tokenizer, min(dials.window, dials.budget))
    if not items or not question.strip():
        raise DocumentError("infini-retri needs a text and a question; one of them is empty")
    asked = tokenizer("\n\n" + question, add_special_tokens=False)["input_ids"]
    lead = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    found = Found([], [], 0, 0)
    weight: Tensor | None = None
    total, read = sum(len(item.ids) for item in items), 0
    with _rows(model) as attend:
        for part in parts(items, dials.window):
            context = [*found.sentences, *part]
            ids = [*lead, *(one for item in context for one in item.ids), *asked]
            rows = attend(ids, len(asked))
            if weight is None:
                weight = rows[:, -len(asked) :].sum(1) ** 2
            score = scores(rows[:, len(lead) : len(ids) - len(asked)], weight, dials.phrase)
            chosen = keep(context, score, dials)
            found = Found(
                [context[place] for place in sorted(chosen)],
                [chosen[place] for place in sorted(chosen)],
                found.queries + len(ids),
                found.entries + len(ids) * (len(ids) + 1) // 2,
            )
            read += sum(len(item.ids) for item in part)
            if on_progress is not None:
                on_progress(read, total)
    return found


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
    retrieval: Retrieval | None = None,
) -> asking.Answer:
    """Answers a question from what `retrieve` leaves of some texts, as `mgam.documents.asking.ask` does from the whole.

    Evidence are the sentences that the question attended to most. `kept` in `tokens` are those of what is left of the
    texts, `budget` at most.

    Raises:
        DocumentError: for an empty question or no text.
        SettingError: `window` or `budget` is less than the tokens of a single character.
    """
    remove(model)
    dials = retrieval or Retrieval()
    text, starts = joined(sources)
    begin = time.perf_counter()
    found = retrieve(model, tokenizer, text, question, dials, on_progress)
    reading = time.perf_counter() - begin
    found, left, kept = _left(found, text, tokenizer, dials.budget)
    answer = asking.ask(
        model, tokenizer, [Source("text", left)], question, max_new_tokens=max_new_tokens, on_text=on_text
    )
    read = answer.tokens["document"] + answer.tokens["question"] + answer.tokens["answer"]
    per_query = (found.entries + read * (read + 1) / 2) / (found.queries + read)
    return replace(
        answer,
        evidence=_evidence(found, text, sources, starts, evidence_count),
        entries_per_level={"1": round(per_query, 1)},
        tokens={**answer.tokens, "document": found.queries, "kept": kept},
        seconds={
            "reading": round(reading + answer.seconds["reading"], 3),
            "to the first token": answer.seconds["to the first token"],
            "answering": answer.seconds["answering"],
        },
        settings={**answer.settings, **asdict(dials), "method": "infini-retri"},
    )


def _left(found: Found, text: str, tokenizer: Any, budget: int) -> tuple[Found, str, int]:
    """What was found, its text and the tokens of that: side by side, pieces may have more than each by itself."""
    while True:
        left = "".join(text[item.start : item.end] for item in found.sentences)
        kept = len(tokenizer(left, add_special_tokens=False)["input_ids"])
        if kept <= budget:
            return found, left, kept
        worst = found.scores.index(min(found.scores))
        others = [place for place in range(len(found.scores)) if place != worst]
        found = replace(
            found,
            sentences=[found.sentences[place] for place in others],
            scores=[found.scores[place] for place in others],
        )


def _evidence(found: Found, text: str, sources: Sequence[Source], starts: Sequence[int], count: int) -> list[Evidence]:
    whole = sum(found.scores) or 1.0
    shown: list[Evidence] = []
    for place in sorted(range(len(found.scores)), key=lambda one: -found.scores[one]):
        item = found.sentences[place]
        source = max(0, bisect_right(starts, item.end - 1) - 1)
        start = max(item.start - starts[source], 0)
        end = min(item.end - starts[source], len(sources[source].text))
        share = round(found.scores[place] / whole, 4)
        if end > start and len(shown) < count:
            shown.append(Evidence(sources[source].name, start, end, sources[source].text[start:end], share))
    return shown


def scores(rows: Tensor, weight: Tensor, phrase: int) -> Tensor:
    """Score (n,) of each token: attention (Q, n) summed over a phrase around it, by the rows' weights (Q,)."""
    kernel = rows.new_ones(1, 1, phrase)
    left = (phrase - 1) // 2
    padded = torch.nn.functional.pad(rows[:, None], (left, phrase - 1 - left))
    return (weight[:, None] * torch.nn.functional.conv1d(padded, kernel)[:, 0]).sum(0)


def keep(context: Sequence[Sentence], score: Tensor, dials: Retrieval) -> dict[int, float]:
    """Numbers of the sentences that hold one of the best tokens, `budget` tokens of them at most, with their scores."""
    owner = torch.repeat_interleave(torch.arange(len(context)), torch.tensor([len(item.ids) for item in context]))
    best = score.cpu().topk(min(dials.topk, len(score)))
    peak: dict[int, float] = {}
    for place, value in zip(owner[best.indices].tolist(), best.values.tolist(), strict=True):
        peak.setdefault(place, value)
    chosen, room = {}, dials.budget
    for place in sorted(peak, key=lambda one: -peak[one]):
        if len(context[place].ids) <= room:
            chosen[place] = peak[place]
            room -= len(context[place].ids)
    return chosen


@contextmanager
def _rows(model: Any) -> Iterator[Any]:
    """While it lasts, gives a function (ids, last) -> attention (last, n) of the last tokens, summed over heads."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    decoder = model.get_decoder()
    module = decoder.layers[-1].self_attn
    model.set_attn_implementation(NAME)
    module._mgam_rows = {"last": 0, "rows": None}

    def attend(ids: Sequence[int], last: int) -> Tensor:
        module._mgam_rows["last"] = last
        decoder(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
        return module._mgam_rows["rows"]

    try:
        yield attend
    finally:
        del module._mgam_rows
        model.set_attn_implementation(before)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    wanted = getattr(module, "_mgam_rows", None)
    if wanted is not None:
        last, tokens = wanted["last"], key.shape[2]
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        asking = query[0, :, -last:].float().unflatten(0, (key.shape[1], -1))
        logits = scale * asking @ key[0, :, None].float().transpose(-1, -2)
        own = torch.arange(tokens - last, tokens, device=key.device)[:, None]
        logits = logits.masked_fill(torch.arange(tokens, device=key.device) > own, -torch.inf)
        wanted["rows"] = torch.softmax(logits, -1).sum((0, 1))
    return sdpa_attention_forward(module, query, key, value, mask, **options)
