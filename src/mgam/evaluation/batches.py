"""Several samples read at once: rows padded on the left, each with the schedule that it would have alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgam.documents.prompt import Prompt, build
from mgam.documents.sources import Source
from mgam.integrations.transformers import prefill
from mgam.integrations.transformers.call_size import call_size


@dataclass(frozen=True)
class Batch:
    """What a batch gave."""

    answers: list[str]
    prompts: list[Prompt]
    entries: float | None
    """Entries per query over all rows; None where the model is dense."""
    reading: float
    """Seconds until the documents of all rows were read."""


@torch.no_grad()
def read_batch(model: Any, tokenizer: Any, documents: Sequence[str], questions: Sequence[str], limit: int) -> Batch:
    """Answers each question from its document, greedily, with at most `limit` tokens.

    Each row is read in calls that cut none of its query blocks, as it would be alone; no evidence is recorded.
    """
    begin = time.perf_counter()
    prompts = [
        build(tokenizer, [Source("document", document)], question)
        for document, question in zip(documents, questions, strict=True)
    ]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = _left_padded([prompt.ids for prompt in prompts], pad, model.device)
    cache, record = _open_cache(model, prompts, ids.shape[1] + limit)
    size = call_size(model, len(prompts))
    if record is None:
        _read(model, ids, mask, cache, ids.shape[1] - max(prompt.question for prompt in prompts), size)
    else:
        lengths, texts = [len(prompt.ids) for prompt in prompts], [prompt.document for prompt in prompts]
        prefill.read(model, cache, ids, lengths, texts, _whole_blocks(size, model))
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    reading = time.perf_counter() - begin
    produced = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=limit,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    answers = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
    entries = None if record is None else sum(record.entries) / max(1.0, record.queries)
    return Batch([answer.strip() for answer in answers], prompts, entries, reading)


def _left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row)
        mask[number, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


def _open_cache(model: Any, prompts: Sequence[Prompt], columns: int) -> tuple[Any, Any]:
    applied = getattr(model, "_mgam_applied", None)
    if applied is None:
        from transformers import DynamicCache

        return DynamicCache(config=model.config.get_text_config(decoder=True)), None
    from mgam.integrations.transformers import PyramidCache
    from mgam.record import Record
    from mgam.schedule import Schedule

    chosen = applied.settings
    schedules = [
        Schedule.reading(
            prompt.document,
            prompt.question,
            block=chosen.block,
            question_block=chosen.question_block,
            lookahead=chosen.lookahead,
        )
        for prompt in prompts
    ]
    cache = PyramidCache(model, schedules, reserve=columns)
    record = Record()
    cache.watch(record)
    return cache, record


def _whole_blocks(size: int, model: Any) -> int:
    """A call that cuts no query block."""
    block = int(model._mgam_applied.settings.block)
    return max(block, size // block * block)


def _read(model: Any, ids: Tensor, mask: Tensor, cache: Any, columns: int, size: int) -> None:
    """Reads the first `columns`, which all belong to documents, without logits."""
    decoder = model.get_decoder()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for first in range(0, columns, size):
        last = min(first + size, columns)
        decoder(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=cache,
            use_cache=True,
        )
