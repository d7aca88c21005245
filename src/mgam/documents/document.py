"""A document that was digested: kept in a folder, opened in seconds, asked as often as one likes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mgam.documents import digesting
from mgam.documents.asking import Answer
from mgam.documents.chat import Chat
from mgam.documents.models import check_model
from mgam.documents.pool import Counts, Pool
from mgam.documents.read_texts import chosen_again, read_question
from mgam.documents.rehearsing import rehearse
from mgam.documents.second_look import NEUTRAL, Passages, shares
from mgam.documents.sources import Source, read_source
from mgam.documents.store import neutral
from mgam.documents.store.manifest import Manifest
from mgam.documents.store.store import Store, changed
from mgam.documents.taking_up import prepare, take_up
from mgam.documents.tiers import HostPages, parse_memory, slots_for
from mgam.documents.tokens import Frame, Places, Tokens, encode
from mgam.errors import DigestError, DocumentError, SettingError
from mgam.integrations import warming
from mgam.integrations.transformers.apply import Applied, applied_to, apply
from mgam.integrations.transformers.cache import Bookmark, PyramidCache
from mgam.record import Record
from mgam.schedule import Schedule, Span
from mgam.settings import Settings
from mgam.threads import quick_turns

ROOM = 2048
"""Tokens of questions and answers that there is room for at once; more takes copying."""

Tier = Literal["disk", "host"]


@dataclass
class Document:
    """An open digest and the model that reads it. One question or talk at a time; make more by opening it again.

    Several can share a model: each question is read by the settings of its own document, whatever was applied since.
    """

    path: Path
    model: Any
    tokenizer: Any
    manifest: Manifest
    settings: Settings
    """What it was opened with; `dense_until` is told."""
    tokens: Tokens
    sources: list[Source]
    pool: Pool
    cache: PyramidCache
    store: Store
    _end: Bookmark
    """Where the texts end in the cache."""
    _seen: list[int] = field(default_factory=list)
    _owner: object | None = None
    _neutral: Tensor | None = None

    @classmethod
    def digest(
        cls,
        model: Any,
        tokenizer: Any,
        sources: Source | str | os.PathLike[str] | Sequence[Source | str | os.PathLike[str]],
        path: str | os.PathLike[str],
        *,
        append: bool = False,
        memory: str | int | None = None,
        eight_bits: bool = False,
        segment: int = digesting.SEGMENT,
        call: int | None = None,
        room: int = ROOM,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Document:
        """Reads texts once and keeps what was read in a folder; goes on where an earlier call was stopped.

        Args:
            model: a causal language model; `mgam.apply` is called on it with the defaults where it was not.
            sources: a text, the name of a file, or several of these; none goes on with an unfinished digest.
            path: the folder, such as `book.mgam`.
            append: add the sources to a finished digest.
            memory: bound of keys, values, summaries and search keys, such as `2GiB`; the weights and a call's work come
                on top.
            eight_bits: keep keys and values rounded to 8 bits.
            segment: tokens in a file of the digest; call: tokens read at once (None: 2,048, and more on a GPU without a
                memory bound). Rounded up to fit blocks and chunks.
            room: as in `open`.
            on_progress: called with tokens digested so far and tokens in all.

        Raises:
            DigestError: the folder holds something else, is being written, is full, or is of another model.
            MemoryBudgetError: the memory bound is below the floor; says the floor.
        """
        if getattr(model, "_mgam_applied", None) is None:
            apply(model)
        given = [sources] if isinstance(sources, str | os.PathLike | Source) else sources
        texts = [source if isinstance(source, Source) else read_source(source) for source in given]
        bound = parse_memory(memory)
        digesting.digest(
            model, tokenizer, texts, Path(path), append=append, memory=bound, eight_bits=eight_bits, room=room,
            call=call, segment=segment, on_progress=on_progress,
        )  # fmt: skip
        document = cls.open(path, model, tokenizer, memory=memory, room=room)
        rehearse(document, applied_to(model).settings.reread)
        return document

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        tokenizer: Any,
        *,
        memory: str | int | None = None,
        tier: Tier = "disk",
        room: int = ROOM,
        question_budget: int | None = None,
        reread: int | None = None,
    ) -> Document:
        """Opens a digest for asking; the model is set to read as the digest was read.

        Args:
            question_budget: tokens that a query of a question or an answer may read in full; None: as it was digested.
            reread: tokens of passages that are read a second time before an answer; None: as it was digested.
            memory: as in `digest`; pages beyond it are fetched again when they are chosen again.
            tier: where pages wait that are not hot: on `disk`, or in main memory (`host`), pinned for a GPU.
            room: tokens of questions and answers that the memory is planned for.

        Raises:
            DigestError: no digest, unfinished, damaged, of another format or of another model.
            MemoryBudgetError: the memory bound is below the floor; says the floor.
            SettingError: there is no such tier.
        """
        folder = Path(path)
        if tier not in get_args(Tier):
            raise SettingError(f"tier={tier!r} must be {' or '.join(map(repr, get_args(Tier)))}")
        store = Store.open(folder)
        manifest = store.manifest
        if not manifest.complete:
            raise DigestError(
                f"{folder} is unfinished: {manifest.done:,} of {manifest.tokens:,} tokens are digested; "
                f"go on with: mgam digest -o {folder}"
            )
        bound = parse_memory(memory)
        device = model.device
        beside = warming.beside(device, model.dtype)
        with beside, quick_turns(), store.residents(device) as parts:  # which are read while the rest is made ready
            warming.import_kernels(device)
            check_model(manifest, model, tokenizer, folder)
            wanted = manifest.settings.with_(dense_until=manifest.dense_until)
            if question_budget is not None:
                wanted = wanted.with_(question_budget=question_budget)
            if reread is not None:
                wanted = wanted.with_(reread=reread)
            _ensure_applied(model, wanted)
            slots = slots_for(manifest.shape, manifest.tokens, room, bound, device)
            pool, cache, together = prepare(model, manifest.shape, manifest.tokens + room, slots)
            tokens = take_up(store, parts, cache, together)
        warming.finish(device, model.dtype)
        if tier == "disk":
            pool.fetch = store.read_pages
        else:
            HostPages.of(store, device).serve(pool)
        sources = [Source(text.name, store.text(number)) for number, text in enumerate(manifest.texts)]
        end = cache.bookmark()
        return cls(folder, model, tokenizer, manifest, wanted, tokens, sources, pool, cache, store, end)

    @property
    def counts(self) -> Counts:
        """How often pages were asked for, and how many had to be fetched."""
        return self.pool.counts

    def changed(self) -> list[str]:
        """Names of sources whose files are still there and hold another text than was digested."""
        return changed(self.manifest)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
        evidence_count: int = 3,
    ) -> Answer:
        """Answers a question, greedily; questions do not see one another.

        Raises:
            DocumentError: an empty question.
            DigestError: a page that was needed is damaged.
        """
        return self.chat().say(question, max_new_tokens=max_new_tokens, on_text=on_text, evidence_count=evidence_count)

    def generate(self, text: str, **options: Any) -> str:
        """What the model writes after the texts and `text`, as it stands; options go to transformers' `generate`."""
        ids = encode(self.tokenizer, text)
        if not ids:
            raise DocumentError("there is nothing to go on from; give at least one token of text")
        produced = self.continue_from(ids, (self.question(len(ids)),), **options)
        return str(self.tokenizer.decode(produced, skip_special_tokens=True))

    def chat(self) -> Chat:
        """A talk of several questions, each of which sees what was said before."""
        return Chat(self)

    def question(self, stop: int) -> Span:
        """How a question is read that ends `stop` tokens after the texts."""
        settings = self.manifest.settings
        return Span(len(self.tokens) + stop, settings.question_block, settings.lookahead)

    def start(self, ids: int) -> PyramidCache:
        """The cache after the texts, ready for a question of `ids` tokens; for those who call the model themselves."""
        self._owner = None
        self._ready()
        self._rewind((self.question(ids),))
        return self.cache

    def look(self, question: str, count: int = 3) -> tuple[Record, Passages] | None:
        """What a first look at a question sees of the texts, and what is to be read again; None where the settings want
        no second look, or the question singles nothing out."""
        applied = self._ready()
        if not applied.settings.reread or len(self.tokens) < self.manifest.dense_until:
            return None
        seen = self.attended(question)
        if not seen.mass:
            return None
        places = Places(self.tokens, self.sources)
        border = len(self.tokens)
        chosen = chosen_again(
            applied, seen, self.neutral(), question, places, self.sources, self.tokenizer, border, count
        )
        return None if chosen is None else (seen, chosen)

    def neutral(self, *, keep: bool = False) -> Tensor:
        """Shares of attention (C,) of a question that asks for nothing, as they were kept beside the digest, else found
        now.

        Args:
            keep: keep them.
        """
        budget, chunks = self._ready().question_budget, len(self.tokens) // self.manifest.shape.levels.chunk
        if self._neutral is None:
            self._neutral = neutral.read(self.path, self.manifest, budget, chunks)
        if self._neutral is None:
            self._neutral = shares(self.attended(NEUTRAL))
            if keep:
                neutral.write(self.path, self.manifest, budget, self._neutral)
        return self._neutral

    def attended(self, question: str) -> Record:
        """What a question attends to at first sight; no answer is made."""
        ids = Frame.of(self.tokenizer).question(self.tokenizer, question)
        record = Record(evidence_from=len(self.tokens))
        cache = self.start(len(ids))
        cache.watch(record)
        try:
            read_question(self.model, cache, ids, len(self.tokens))
        finally:
            cache.watch(None)
        return record

    def continue_from(
        self, ids: list[int], spans: tuple[Span, ...], *, owner: object | None = None, **options: Any
    ) -> list[int]:
        """Tokens generated after the texts and `ids`, in blocks by `spans`; an `owner` goes on where it stopped."""
        self._ready()
        if owner is None or owner is not self._owner or ids[: len(self._seen)] != self._seen:
            self._rewind(spans)
        self._schedule(spans)
        whole = torch.cat((torch.from_numpy(self.tokens.ids.astype(np.int64)), torch.tensor(ids)))[None].to(
            self.model.device
        )
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        defaults: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": pad}
        if not options.get("do_sample"):
            defaults |= {"temperature": None, "top_p": None, "top_k": None}
        self._owner = None  # until it is known where the cache stands
        produced = self.model.generate(
            whole, attention_mask=torch.ones_like(whole), past_key_values=self.cache, **{**defaults, **options}
        )
        new: list[int] = produced[0, whole.shape[1] :].tolist()
        self._seen = [*ids, *new][: self.cache.get_seq_length() - len(self.tokens)]
        self._owner = owner
        return new

    def close(self) -> None:
        """Closes the digest's files."""
        self.store.close()

    def _ready(self) -> Applied:
        """Sets the model to this document's settings again, where others were applied since."""
        return _ensure_applied(self.model, self.settings)

    def _schedule(self, spans: tuple[Span, ...]) -> None:
        settings = self.manifest.settings
        schedule = Schedule((Span(len(self.tokens), settings.block, settings.lookahead), *spans, Span(None, 1)))
        for layer in self.cache.pyramids.values():
            layer.schedules = [schedule]

    def _rewind(self, spans: tuple[Span, ...]) -> None:
        """Forgets all that was said after the texts."""
        self.cache.go_back(self._end)
        self._seen = []
        self._schedule(spans)


def _ensure_applied(model: Any, settings: Settings) -> Applied:
    """Makes a model read by these settings, which tell `dense_until`, if it does not yet.

    Raises:
        SettingError: a learned policy or adapters that the settings name are gone, or another model's.
    """
    there: Applied | None = getattr(model, "_mgam_applied", None)
    if there is None or there.settings.with_(dense_until=there.reading.dense_until) != settings:
        apply(model, settings)
    return applied_to(model)
