"""The work of digesting: one model reads what is not digested yet, and writes a segment whenever one is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgam.documents.paged import PagedPyramid
from mgam.documents.pool import Pool
from mgam.documents.store import files, rounding
from mgam.documents.store.lock import NAME as LOCK_NAME
from mgam.documents.store.manifest import NAME as MANIFEST_NAME
from mgam.documents.store.manifest import Manifest, Segment
from mgam.documents.store.names import is_ours
from mgam.documents.store.pages import decode, encode
from mgam.documents.store.segment import LayerPart, TokenPart, write
from mgam.documents.store.store import Store
from mgam.documents.taking_up import Layers, set_recent
from mgam.documents.tiers import slots_for
from mgam.documents.tokens import Tokens, check_equal
from mgam.errors import DigestError, SettingError
from mgam.integrations.transformers import Applied, PyramidCache
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule, Span

Progress = Callable[[int, int], None]


class Builder:
    """One run of the model over what is not digested yet."""

    def __init__(
        self,
        path: Path,
        model: Any,
        applied: Applied,
        manifest: Manifest,
        tokens: Tokens,
        memory: int | None,
        room: int,
    ) -> None:
        if len(tokens) != manifest.tokens:
            raise DigestError(
                f"the tokenizer makes {len(tokens):,} tokens of the stored texts, {manifest.tokens:,} were counted"
            )
        self.path, self.model, self.applied, self.tokens = path, model, applied, tokens
        self.manifest = manifest
        self.shape = manifest.shape
        self._refuse_full_disk()
        self._sweep()
        self.store = Store.open(path)
        self.cache = PyramidCache(model, [self._schedule()])
        self.pool = self._pool(memory, room)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[Manifest] | None = None
        self._load()

    def run(self, on_progress: Progress | None) -> Manifest:
        """Reads everything and returns the finished manifest."""
        decoder, total = self.model.get_decoder(), len(self.tokens)
        ids = torch.from_numpy(self.tokens.ids).to(torch.int64)
        if on_progress is not None:
            on_progress(self.manifest.done, total)
        try:
            with torch.no_grad():
                for first in range(self.manifest.done, total, self.manifest.call):
                    last = min(first + self.manifest.call, total)
                    self._read(decoder, ids[first:last], first)
                    if last % self.manifest.grid == 0 or last == total:
                        self._flush(last)
                    if on_progress is not None:
                        on_progress(last, total)
            self._settle()
        finally:
            self._writer.shutdown()
        return self.manifest

    def _read(self, decoder: Any, ids: Tensor, first: int) -> None:
        device = self.model.device
        decoder(
            input_ids=ids[None].to(device),
            position_ids=torch.arange(first, first + len(ids), device=device)[None],
            past_key_values=self.cache,
            use_cache=True,
        )

    def _schedule(self) -> Schedule:
        settings = self.applied.settings
        after = max(1, self.shape.recent // 2)  # so that the last queries are kept for a question's votes
        return Schedule((Span(len(self.tokens), settings.block, settings.lookahead), Span(None, after)))

    def _pool(self, memory: int | None, room: int) -> Pool | None:
        """A pool of pages, or none where everything stays on the device."""
        device, total = self.model.device, len(self.tokens)
        if not _paged(device, memory):
            for layer in self.cache.pyramids.values():
                layer.pyramid.reserve(total)
            return None
        pool = Pool(self.shape, plan_memory(self.manifest, memory, room, device), device)
        pool.fetch = self.store.read_pages
        pool.reserve(-(-total // self.shape.levels.chunk))
        for number, layer in self.cache.pyramids.items():
            layer.pyramid = PagedPyramid(self.shape.levels, pool, number, 0 if self.manifest.done else total)
        return pool

    def _load(self) -> None:
        """Takes up what is on disk."""
        done = 0
        layers, together = self.cache.pyramids, None
        with self.store.residents(self.model.device) as parts:
            for part, found in parts:
                stored = TokenPart(found.numbers("ids"), found.numbers("texts"), found.numbers("offsets"))
                check_equal(stored, self.tokens.part(part.first, part.first + part.tokens))
                if self.pool is None:
                    for number, layer in layers.items():
                        self._load_tokens(layer.pyramid, number, part)
                if together is None:
                    together = Layers.of([layer.pyramid for layer in layers.values()], len(self.tokens))
                together.load(part, found)
                if self.shape.recent:
                    for number, layer in layers.items():
                        set_recent(layer, found[f"layers.{number}.recent"][None])
                done = part.first + part.tokens
        for layer in self.cache.pyramids.values():
            layer.columns = done

    def _load_tokens(self, pyramid: Pyramid, layer: int, part: Segment) -> None:
        shape = self.shape
        first, count = part.first // shape.levels.chunk, part.tokens // shape.levels.chunk
        pages = torch.empty(count * shape.heads, shape.page_bytes, dtype=torch.uint8)
        chunk, head = np.divmod(np.arange(count * shape.heads), shape.heads)
        self.store.read_pages(layer, head, chunk + first, pages)
        both = [
            states.unflatten(0, (count, shape.heads)).transpose(0, 1).flatten(1, 2)[None]
            for states in decode(pages, shape)
        ]
        if not pyramid.lengths:
            pyramid.begin(both[0].to(self.model.device))
            pyramid.grow(len(self.tokens))
        pyramid.put(slice(None), part.first, *(states.to(self.model.device) for states in both))

    def _flush(self, last: int) -> None:
        """Writes the segment that ends here, and lets its pages go.

        Where all stays on the GPU the segment is written beside the reading of the next one.
        """
        self._settle()
        first, layers = self.manifest.done, self.shape.layers
        if self.pool is None:
            parts = [self._part(layer, first, last) for layer in range(layers)]
            self._writing = self._writer.submit(self._write, first, last, lambda layer: parts[layer].on_cpu())
            return
        self.manifest = self._write(first, last, lambda layer: self._part(layer, first, last).on_cpu())
        self.store.manifest = self.manifest
        number = len(self.manifest.segments) - 1
        self.store.learn_checks(number, self.store.resident(number))
        chunk = self.shape.levels.chunk
        for layer in self.cache.pyramids:
            self.pool.release(layer, first // chunk, last // chunk)

    def _settle(self) -> None:
        """Waits for the segment that is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.manifest = writing.result()

    def _write(self, first: int, last: int, layer: Callable[[int], LayerPart]) -> Manifest:
        """Writes tokens [first, last) and returns the manifest that says so, which is on disk by then."""
        manifest, count = self.manifest, last - first
        name = Segment.file_of(len(manifest.segments), count, manifest.grid)
        layout = manifest.layout(Segment(name, first, count, ""))
        sha256 = write(self.path, name, layout, self.tokens.part(first, last), layer)
        manifest = manifest.with_(
            segments=(*manifest.segments, Segment(name, first, count, sha256)), complete=last == len(self.tokens)
        )
        manifest.write(self.path)
        return manifest

    def _part(self, number: int, first: int, last: int) -> LayerPart:
        """What one layer puts into the segment of tokens [first, last)."""
        layer = self.cache.pyramids[number]
        pyramid, shape = layer.pyramid, self.shape
        chunk = shape.levels.chunk
        whole = last // chunk * chunk
        keys, values = pyramid.complete(slice(None), first // chunk, last // chunk)
        pages = encode(keys[0], values[0], shape)
        if shape.bits == 8:  # from here on all read what is kept, whether they go on now or after a pause
            found = decode(pages.flatten(0, 1), shape)
            rounded = [states.unflatten(0, pages.shape[:2]).transpose(0, 1).flatten(1, 2)[None] for states in found]
            pyramid.put(slice(None), first, rounded[0], rounded[1])
        rest = torch.empty(2, shape.heads, 0, shape.dim, dtype=keys.dtype)
        if last > whole:
            row = torch.zeros(1, dtype=torch.int64, device=keys.device)
            tail = pyramid.window(row, row + whole, last - whole, row + last - 1)
            rest = torch.cat(tail)
        recent = torch.empty(shape.query_heads, 0, shape.dim, dtype=keys.dtype)
        if shape.recent:
            assert layer.recent is not None
            recent = layer.recent[0, :, -min(shape.recent, last - first) :]
        kept = dict(_between(pyramid, first, last))
        steps = _round(pyramid, kept) if shape.bits == 8 else {}
        levels = range(1, shape.levels.top + 1)
        coarse = [kept[f"keys.{level}"] for level in levels], [kept[f"values.{level}"] for level in levels]
        return LayerPart(pages, *coarse, kept["search"], rest, recent, steps)

    def _refuse_full_disk(self) -> None:
        need = int((self.manifest.tokens - self.manifest.done) * self.shape.disk_bytes_per_token)
        free = shutil.disk_usage(self.path).free
        if need > free:
            raise DigestError(
                f"the rest of this digest takes about {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free "
                f"where {self.path} lies; make room, choose another place, or halve the need with --eight-bits"
            )

    def _sweep(self) -> None:
        """Removes what a stopped writer, or the last append, left."""
        kept = {MANIFEST_NAME, LOCK_NAME, *(text.file for text in self.manifest.texts)}
        kept |= {segment.file for segment in self.manifest.segments}
        with files.explained(self.path):
            for file in self.path.iterdir():
                if file.name not in kept and is_ours(file.name):
                    file.unlink()


def plan_memory(manifest: Manifest, memory: int | None, room: int, device: torch.device) -> int:
    """Slots of a pool for digesting, and then asking, within a bound.

    Raises:
        SettingError: the method reads all of a layer at once.
        MemoryBudgetError: the bound is below the floor.
    """
    if memory is not None and manifest.settings.method == "dense":
        raise SettingError("a memory bound needs a method that chooses what it reads; dense reads all of every layer")
    live = max(manifest.grid + manifest.call, room)  # what is asked later must fit the same bound
    return slots_for(manifest.shape, manifest.tokens, live, memory, device)


def _paged(device: torch.device, memory: int | None) -> bool:
    """Whether pages go through a pool; else all stays on the GPU, where kernels read it in place."""
    return device.type != "cuda" or memory is not None


def _between(pyramid: Pyramid, first: int, last: int) -> Iterator[tuple[str, Tensor]]:
    """Summaries of every level (H, n, D) and search keys (H, S, C, D) of tokens [first, last), by name."""
    assert pyramid.search is not None
    for level, size in enumerate(pyramid.levels.sizes[1:], start=1):
        span = slice(first // size, last // size)
        yield f"keys.{level}", pyramid.keys[level][0, :, span]
        yield f"values.{level}", pyramid.values[level][0, :, span]
    yield "search", pyramid.search[0, :, :, first // pyramid.levels.chunk : last // pyramid.levels.chunk]


def _round(pyramid: Pyramid, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rounds what is kept to 8 bits, in the pyramid too: from here on all read it so. Returns the steps (H, D)."""
    steps = {}
    for name, states in kept.items():
        kept[name], step = rounding.small(states, *range(1, states.dim() - 1))
        states.copy_(rounding.plain(kept[name], step, states.dtype))
        steps[name] = step.flatten(1)
    pyramid.derived.clear()
    return steps
