"""Readers made from transformers models: dense, or with any method that `mgam.apply` knows, by the same calls."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgam import methods
from mgam.errors import MemoryBudgetError, SettingError
from mgam.evaluation.reader import DoesNotFitError, Passage, Reading
from mgam.integrations.memory import peak_memory_bytes, refuse_if_too_large
from mgam.integrations.transformers.apply import apply, remove

DENSE = "dense"
NULLABLE = ("dense_until", "backend")
"""Settings whose `none` means that mgam chooses."""
LOSS_CALL, GPU_LOSS_CALL = 512, 2048
"""Tokens per call when losses are wanted: the logits of a call are vocabulary times this."""


class ModelReader:
    """A model that reads with one method; what it reads and answers by are the calls of `mgam ask`.

    The method is applied when reading starts and undone by `close`, so that readers of one model take turns.
    `label` is the method's name, with settings as in `mgam:budget=2048:window=256`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, label: str, *, name: str = "", settings: dict[str, Any] | None = None
    ):
        self._model, self._tokenizer = model, tokenizer
        self._label = label
        self._method, self._changes = parse_method(label)
        self._changes = {**(settings or {}), **self._changes} if self._method != DENSE else {}
        self._name = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        self._kept: dict[str, Any] | None = None
        self._loop = self._method != DENSE and methods.get(self._method).form == "loop"

    @property
    def method(self) -> str:
        return self._label

    @property
    def model(self) -> str:
        return self._name

    @property
    def settings(self) -> Mapping[str, Any]:
        if self._kept is None:
            self._kept = self._open()
        return self._kept

    def _open(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"method": self._method}
        if self._method == DENSE or self._loop:
            remove(self._model)
            kept |= asdict(self._dials()) if self._loop else {}
        else:
            apply(self._model, self._method, **self._changes)
            applied = self._model._mgam_applied
            kept = {
                **applied.settings.as_dict(),
                "dense_until": applied.reading.dense_until,
                "question_budget": applied.question_budget,
            }
        config = self._model.config.get_text_config(decoder=True)
        kept["trained_window"] = getattr(config, "max_position_embeddings", None)
        kept["dtype"] = str(self._model.dtype).removeprefix("torch.")
        kept["device"] = self._model.device.type
        return kept

    def _dials(self) -> Any:
        return methods.get(self._method).checked(**self._changes)

    def close(self) -> None:
        """Makes the model dense again."""
        remove(self._model)
        self._kept = None

    def read(self, document: str, question: str, max_new_tokens: int) -> Reading:
        """Answers greedily; see `mgam.documents.asking.ask`."""
        from mgam.documents import asking, infiniretri
        from mgam.documents.sources import Source

        _ = self.settings
        tokens, sources = len(self._tokenizer(document)["input_ids"]) + max_new_tokens, [Source("document", document)]
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if self._loop:
            how["retrieval"] = dials = self._dials()
            tokens = min(tokens, dials.window + dials.budget + max_new_tokens)
        with self._measured(tokens) as measured:
            ask = infiniretri.ask if self._loop else asking.ask
            answer = ask(self._model, self._tokenizer, sources, question, **how)
        entries = sum(answer.entries_per_level.values())
        if self._method == DENSE:
            entries = _dense_entries(answer.tokens["document"] + answer.tokens["question"], answer.tokens["answer"])
        return Reading(
            answer=answer.answer,
            evidence=tuple(Passage(one.start, one.end) for one in answer.evidence),
            seconds=measured["seconds"],
            peak_memory_bytes=measured["peak"],
            entries_per_query=entries,
            preprocess_seconds=answer.seconds["reading"],
        )

    def read_batch(self, documents: Sequence[str], questions: Sequence[str], max_new_tokens: int) -> list[Reading]:
        """Answers several questions at once, without evidence; seconds are shared out, the peak is the batch's."""
        from mgam.evaluation.batches import read_batch

        _ = self.settings
        if self._loop or self._changes.get("reread"):  # every document is read by calls of its own
            pairs = zip(documents, questions, strict=True)
            return [self.read(document, question, max_new_tokens) for document, question in pairs]
        lengths = [len(self._tokenizer(document)["input_ids"]) + max_new_tokens for document in documents]
        with self._measured(max(lengths) * len(lengths)) as measured:
            batch = read_batch(self._model, self._tokenizer, documents, questions, max_new_tokens)
        seconds = measured["seconds"] / len(documents)
        return [
            Reading(
                answer,
                (),
                seconds,
                measured["peak"],
                batch.entries or _dense_entries(len(prompt.ids), 1),
                preprocess_seconds=batch.reading / len(documents),
            )
            for answer, prompt in zip(batch.answers, batch.prompts, strict=True)
        ]

    def losses(self, document: str) -> Reading:
        """Nats of each token after the first, read in calls with a cache; covers look at nothing ahead.

        Raises:
            DoesNotFitError: for a loop, which reads for a question only.
        """
        if self._loop:
            raise DoesNotFitError(f"{self._method} reads for a question, so it has no loss of a text")
        _ = self.settings
        ids = torch.tensor([self._tokenizer(document)["input_ids"]], device=self._model.device)
        with self._measured(ids.shape[1]) as measured:
            found, entries = self._read_losses(ids)
        return Reading("", (), measured["seconds"], measured["peak"], entries, found)

    @torch.no_grad()
    def _read_losses(self, ids: Tensor) -> tuple[list[float], float]:
        cache, record = self._loss_cache(ids.shape[1])
        found: list[Tensor] = []
        size = GPU_LOSS_CALL if ids.is_cuda else LOSS_CALL
        for first in range(0, ids.shape[1], size):
            part = ids[:, first : first + size]
            logits = self._model(input_ids=part, past_key_values=cache, use_cache=True).logits[0].float()
            targets = ids[0, first + 1 : first + 1 + part.shape[1]]
            found.append(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="none").cpu())
        if record is None:
            return torch.cat(found).tolist(), _dense_entries(ids.shape[1], 0)
        return torch.cat(found).tolist(), sum(record.entries) / max(1.0, record.queries)

    def _loss_cache(self, tokens: int) -> tuple[Any, Any]:
        from transformers import DynamicCache

        if self._method == DENSE:
            return DynamicCache(config=self._model.config.get_text_config(decoder=True)), None
        from mgam.integrations.transformers import PyramidCache
        from mgam.record import Record
        from mgam.schedule import Schedule

        schedule = Schedule.uniform(self._model._mgam_applied.settings.block, "none")
        cache = PyramidCache(self._model, [schedule], reserve=tokens)
        record = Record()
        cache.watch(record)
        return cache, record

    @contextmanager
    def _measured(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Seconds and peak bytes of what is done inside; memory that runs out becomes DoesNotFitError."""
        found: dict[str, Any] = {}
        reset_peak(self._model.device)
        begin = time.perf_counter()
        try:
            refuse_if_too_large(self._model, tokens)
            yield found
            if self._model.device.type == "cuda":
                torch.cuda.synchronize(self._model.device)
        except MemoryBudgetError as error:
            raise DoesNotFitError(str(error)) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise DoesNotFitError(f"out of memory: {str(error).splitlines()[0]}") from error
        found["seconds"] = time.perf_counter() - begin
        found["peak"] = peak_memory_bytes()


def _dense_entries(prompt: int, generated: int) -> float:
    """Mean number of tokens that a dense query sees: query number i of a text sees i tokens, itself included."""
    return (prompt + max(0, generated - 1) + 1) / 2


def reset_peak(device: torch.device) -> None:
    """Starts the process's peak memory anew where the system can, so that one reading's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident high-water mark falls to what is held now
    except OSError:
        return


def parse_method(label: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name:setting=value:...` as a method's name and its settings."""
    name, *parts = label.split(":")
    changes: dict[str, Any] = {}
    for part in parts:
        setting, equals, value = part.partition("=")
        if not equals or not setting or not value:
            raise SettingError(
                f"{part!r} in method {label!r} is no setting; write name:setting=value, as mgam:budget=512"
            )
        changes[setting] = None if setting in NULLABLE and value.lower() == "none" else _value(value)
    if name == DENSE and changes:
        raise SettingError(
            f"{label!r}: dense is the model as it is and has no settings; mgam:adapter=NAME:dense_until=8192 reads "
            "texts of up to so many tokens in full, with adapters"
        )
    return name, changes


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "/" in text and all(piece.isdigit() for piece in text.split("/")):
        return tuple(int(piece) for piece in text.split("/"))  # levels=1/64/1024
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
