"""Digesting: which texts, model and grid a digest is made of, and whether one is begun, gone on with or added to.

Calls begin on one grid, whatever happened before: a digest that ran through, was stopped and resumed, or was appended
to has the same bytes.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgam.documents import fingerprint
from mgam.documents.building import Builder, Progress, plan_memory
from mgam.documents.models import check_model, shape_of
from mgam.documents.sources import PIPED, Source
from mgam.documents.store import files, neutral
from mgam.documents.store.layout import Shape
from mgam.documents.store.lock import NAME as LOCK_NAME
from mgam.documents.store.lock import WriterLock
from mgam.documents.store.manifest import NAME as MANIFEST_NAME
from mgam.documents.store.manifest import Manifest, Text, step_of
from mgam.documents.store.names import is_ours
from mgam.documents.store.store import Store, write_text
from mgam.documents.tokens import tokens_of
from mgam.errors import DigestError, DocumentError
from mgam.integrations.transformers import Applied, applied_to
from mgam.integrations.transformers.call_size import LEAST, call_size

SEGMENT = 4096
"""Tokens in a segment, unless calls, blocks and chunks need more."""
LARGEST = 16384
"""Tokens of a call at most, unless more are asked for: what was read is written while the next call runs."""


@dataclass(frozen=True)
class Grid:
    """Where calls and segments begin."""

    call: int
    segment: int

    @classmethod
    def of(cls, model: Any, applied: Applied, memory: int | None, call: int | None, segment: int) -> Grid:
        """Calls of about `call` tokens in whole blocks, and segments on which calls, blocks and all chunks end.

        Without `call`, calls are as large as they are everywhere, up to `LARGEST`, but small under a memory bound: what
        a call reads stays in memory until its segment is written.
        """
        if call is None:
            call = min(LARGEST, call_size(model)) if memory is None else LEAST
        call = -(-call // applied.settings.block) * applied.settings.block
        step = step_of(applied.settings, call)
        return cls(call, -(-segment // step) * step)


def digest(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Source],
    path: Path,
    *,
    append: bool = False,
    memory: int | None = None,
    eight_bits: bool = False,
    room: int = 0,
    call: int | None = None,
    segment: int = SEGMENT,
    on_progress: Progress | None = None,
) -> Manifest:
    """Digests texts into a folder, or goes on where an earlier call was stopped; see `Document.digest`."""
    applied = applied_to(model)
    if twice := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise DocumentError(f"{twice[0]} is given twice; name each text once, so that evidence can tell them apart")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.refuse_link(path)
    if path.exists() and not path.is_dir():
        raise DigestError(f"{path} is a file; name a folder that is to hold the digest, such as book.mgam")
    with files.explained(path):
        path.mkdir(exist_ok=True)
        _refuse_others(path)
    with WriterLock(path):
        if _has_manifest(path):
            manifest = _go_on(path, model, tokenizer, sources, append=append)
        else:
            shape = shape_of(model, applied, eight_bits)
            grid = Grid.of(model, applied, memory, call, segment)
            manifest = _new(model, tokenizer, sources, applied, shape, grid)
            plan_memory(manifest, memory, room, model.device)
            texts_kept = tuple(write_text(path, n, source.name, source.text) for n, source in enumerate(sources))
            manifest = manifest.with_(texts=texts_kept)
            manifest.write(path)
        if manifest.complete:
            return manifest
        texts = [Source(text.name, Store(path, manifest).text(n)) for n, text in enumerate(manifest.texts)]
        manifest = Builder(path, model, applied, manifest, tokens_of(tokenizer, texts), memory, room).run(on_progress)
    if model.device.type == "cuda":  # what held the texts makes room for those who open the digest
        gc.collect()
        torch.cuda.empty_cache()
    return manifest


def _has_manifest(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_symlink() or (path / MANIFEST_NAME).exists()


def _refuse_others(path: Path) -> None:
    """Refuses a folder that holds anything but a digest, or what a writer left that was stopped before its manifest.

    Such a writer left its lock too: without one, files that are named like a digest's are somebody else's.

    Raises:
        DigestError: it does.
    """
    if _has_manifest(path):
        Manifest.read(path)
        return
    there = sorted(file.name for file in path.iterdir())
    begun = (path / LOCK_NAME).exists()
    if strange := [name for name in there if not (begun and is_ours(name))]:
        raise DigestError(f"{path} holds other files ({', '.join(strange[:3])}); name a new folder for the digest")


def _new(model: Any, tokenizer: Any, sources: Sequence[Source], applied: Applied, shape: Shape, grid: Grid) -> Manifest:
    """The manifest of a digest of which nothing is written yet."""
    return Manifest(
        model={
            "name": getattr(model, "name_or_path", "") or "",
            "fingerprint": fingerprint.of_model(model, applied.settings.adapter),
        },
        tokenizer=fingerprint.of_tokenizer(tokenizer),
        shape=shape,
        settings=applied.settings,
        dense_until=applied.reading.dense_until,
        call=grid.call,
        grid=grid.segment,
        tokens=len(tokens_of(tokenizer, sources)),
        texts=(),
        segments=(),
        complete=False,
        made_with=fingerprint.versions(),
    )


def _go_on(path: Path, model: Any, tokenizer: Any, sources: Sequence[Source], *, append: bool) -> Manifest:
    """The manifest to work on: that of an unfinished digest, of a finished one, or one with texts added."""
    manifest = Manifest.read(path)
    applied = applied_to(model)
    kept = manifest.settings
    read = applied.settings.with_(  # the first two change no byte of a digest, the last is told by its outcome
        question_budget=kept.question_budget, reread=kept.reread, dense_until=kept.dense_until
    )
    if read != kept or applied.reading.dense_until != manifest.dense_until:
        raise DigestError(f"{path} was begun with other settings; leave them out to go on with those it has")
    check_model(manifest, model, tokenizer, path)
    given = [(source.name, Text.hash(source.text)) for source in sources]
    known = [(text.name, text.sha256) for text in manifest.texts]
    if not append:
        if given and given != known:
            raise DigestError(f"{path} {_differs(given, known)}")
        return manifest
    if changed := _changed(given, known):
        raise DigestError(
            f"{path} holds {', '.join(changed[:3])} as it was, and it has changed since; digest into a new folder, or "
            "add it under another name"
        )
    new = [source for source, pair in zip(sources, given, strict=True) if pair not in known]
    if not new:
        return manifest
    if not manifest.complete:
        raise DigestError(
            f"{path} is unfinished ({manifest.done:,} of {manifest.tokens:,} tokens); finish it first with: "
            f"mgam digest -o {path}"
        )
    texts = [Source(text.name, Store(path, manifest).text(n)) for n, text in enumerate(manifest.texts)]
    count = len(texts)
    more = manifest.with_(
        tokens=len(tokens_of(tokenizer, [*texts, *new])),
        texts=(
            *manifest.texts,
            *(write_text(path, count + n, source.name, source.text) for n, source in enumerate(new)),
        ),
        segments=manifest.whole,
        complete=False,
    )
    neutral.forget(path)
    more.write(path)
    return more


def _changed(given: list[tuple[str, str]], known: list[tuple[str, str]]) -> list[str]:
    """Names of texts that a digest holds as they were; what came through a pipe has no name of its own."""
    names = dict(known)
    return [name for name, sha in given if names.get(name, sha) != sha and name != PIPED]


def _differs(given: list[tuple[str, str]], known: list[tuple[str, str]]) -> str:
    """How the texts given differ from those that a digest holds."""
    if changed := _changed(given, known):
        return f"holds {', '.join(changed[:3])} as it was, and it has changed since; digest into a new folder"
    return "holds other texts; add these with --append, or name a new folder"
