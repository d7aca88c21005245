"""Digesting: reads texts in calls of one size and writes a segment whenever one is complete.

Calls begin on one grid, whatever happened before: a digest that ran through, was stopped and resumed, or was appended
to has the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgam.documents import fingerprint
from mgam.documents.paged import PagedPyramid
from mgam.documents.pool import Pool
from mgam.documents.sources import Source
from mgam.documents.store import files
from mgam.documents.store.layout import CODES, Shape
from mgam.documents.store.lock import NAME as LOCK_NAME
from mgam.documents.store.lock import WriterLock
from mgam.documents.store.manifest import NAME as MANIFEST_NAME
from mgam.documents.store.manifest import Manifest, Segment, Text, step_of
from mgam.documents.store.pages import decode, encode
from mgam.documents.store.segment import LayerPart, Resident, TokenPart, write
from mgam.documents.store.store import Store, write_text
from mgam.documents.tiers import slots_for
from mgam.documents.tokens import Tokens, check_equal, tokens_of
from mgam.errors import DigestError, SettingError, UnsupportedModelError
from mgam.integrations.transformers import Applied, PyramidCache, applied_to
from mgam.integrations.transformers.cache import PyramidLayer
from mgam.integrations.transformers.call_size import LEAST, call_size
from mgam.integrations.transformers.tail import Tail
from mgam.policies import Dyadic, Full, Scored, Window
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule, Span
from mgam.settings import Settings

SEGMENT = 4096
"""Tokens in a segment, unless calls, blocks and chunks need more."""

SERVED = (Scored, Window, Dyadic, Full)
"""Policies that choose by search keys and places alone."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Grid:
    """Where calls and segments begin."""

    call: int
    segment: int

    @classmethod
    def of(cls, model: Any, applied: Applied, memory: int | None, call: int | None, segment: int) -> Grid:
        """Calls of about `call` tokens in whole blocks, and segments on which calls, blocks and all chunks end.

        Without `call`, calls are as large as they are everywhere, but small under a memory bound: what a call reads
        stays in memory until its segment is written.
        """
        if call is None:
            call = call_size(model) if memory is None else LEAST
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
    path.parent.mkdir(parents=True, exist_ok=True)
    files.refuse_link(path)
    if path.exists() and not path.is_dir():
        raise DigestError(f"{path} is a file; name a folder that is to hold the digest, such as book.mgam")
    with files.explained(path):
        path.mkdir(exist_ok=True)
    with WriterLock(path):
        if _has_manifest(path):
            manifest = _go_on(path, model, tokenizer, sources, append=append)
        else:
            shape = shape_of(model, applied, eight_bits)
            grid = Grid.of(model, applied, memory, call, segment)
            manifest = _new(model, tokenizer, sources, applied, shape, grid)
            _check_memory(manifest, memory, room, model.device)
            texts_kept = tuple(write_text(path, n, source.name, source.text) for n, source in enumerate(sources))
            manifest = manifest.with_(texts=texts_kept)
            manifest.write(path)
        if manifest.complete:
            return manifest
        texts = [Source(text.name, Store(path, manifest).text(n)) for n, text in enumerate(manifest.texts)]
        return _Builder(path, model, applied, manifest, tokens_of(tokenizer, texts), memory, room).run(on_progress)


def shape_of(model: Any, applied: Applied, eight_bits: bool) -> Shape:
    """What all segments of a model's digests have in common.

    Raises:
        UnsupportedModelError: some layers keep other states than pyramids.
    """
    config = model.config.get_text_config(decoder=True)
    if sorted(applied.layers) != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            "a digest keeps layers with full attention only, and this model has others too (sliding or linear)"
        )
    if not isinstance(applied.reading.policy, SERVED):
        raise UnsupportedModelError(
            f"method {applied.settings.method!r} keeps more than keys, values and summaries, which a digest does not "
            "hold; digest with method mgam, streaming-llm or dyadic"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in CODES:
        raise UnsupportedModelError(f"a digest holds {', '.join(CODES)}, and the model has {dtype}")
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reach = _votes_before(applied.settings)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bits = 8 if eight_bits else getattr(torch, dtype).itemsize * 8
    return Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        heads,
        dim,
        dtype,
        applied.settings.pyramid_levels,
        reach,
        bits,
    )


def _votes_before(settings: Settings) -> int:
    """Queries before a segment that vote for blocks after it; calls cut no block, so lookahead=block needs none."""
    return 2 * max(settings.block, settings.question_block) if settings.lookahead == "none" else 0


def set_recent(layer: PyramidLayer, queries: Tensor | None) -> None:
    """Gives a layer the last queries (1, Hq, R, D) before its next call."""
    votes = Tail()
    if queries is not None:
        votes.keep([queries], [queries.shape[2]], queries.shape[2])
    layer._votes = votes


def check_model(manifest: Manifest, model: Any, tokenizer: Any, path: Path) -> None:
    """Refuses another model or tokenizer than made the digest.

    Raises:
        DigestError: it is another.
    """
    named = manifest.model["name"] or "another model"
    if str(model.dtype).removeprefix("torch.") != manifest.shape.dtype:
        raise DigestError(
            f"{path} was made in {manifest.shape.dtype}, the model is in {str(model.dtype).removeprefix('torch.')}; "
            f"load it with --dtype {manifest.shape.dtype}"
        )
    config, shape = model.config.get_text_config(decoder=True), manifest.shape
    if (shape.layers, shape.query_heads) != (config.num_hidden_layers, config.num_attention_heads):
        raise DigestError(
            f"{path} has {shape.layers} layers of {shape.query_heads} heads, the model {config.num_hidden_layers} of "
            f"{config.num_attention_heads}; load {named}, or digest again"
        )
    if fingerprint.of_model(model) != manifest.model["fingerprint"]:
        raise DigestError(
            f"{path} was made with {named}, and other weights were given; load that model, or digest again"
        )
    if fingerprint.of_tokenizer(tokenizer) != manifest.tokenizer:
        raise DigestError(
            f"{path} was made with another tokenizer than was given; use that of {named}, or digest again"
        )


def load_layer(pyramid: Pyramid, layer: int, part: Segment, found: Resident) -> None:
    """Puts summaries and search keys of a segment into a pyramid that has room for them."""
    for level, size in enumerate(pyramid.levels.sizes[1:], start=1):
        first = part.first // size
        for kind, states in (("keys", pyramid.keys), ("values", pyramid.values)):
            new = found[f"layers.{layer}.{kind}.{level}"]
            states[level][0, :, first : first + new.shape[1]] = new
    assert pyramid.search is not None
    search = found[f"layers.{layer}.search"]
    first = part.first // pyramid.levels.chunk
    pyramid.search[0, :, :, first : first + search.shape[2]] = search
    pyramid.lengths = [part.first + part.tokens]


def _has_manifest(path: Path) -> bool:
    if (path / MANIFEST_NAME).is_symlink() or (path / MANIFEST_NAME).exists():
        return True
    strange = [file.name for file in path.iterdir() if not _is_ours(file.name)]
    if strange:
        raise DigestError(
            f"{path} holds other files ({', '.join(sorted(strange)[:3])}); name a new folder for the digest"
        )
    return False


def _is_ours(name: str) -> bool:
    plain = name.removesuffix(files.TEMPORARY)
    return plain in (LOCK_NAME, MANIFEST_NAME) or plain.startswith(("text-", "segment-"))


def _new(model: Any, tokenizer: Any, sources: Sequence[Source], applied: Applied, shape: Shape, grid: Grid) -> Manifest:
    """The manifest of a digest of which nothing is written yet."""
    return Manifest(
        model={"name": getattr(model, "name_or_path", "") or "", "fingerprint": fingerprint.of_model(model)},
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


def _check_memory(manifest: Manifest, memory: int | None, room: int, device: torch.device) -> int:
    """Slots of a pool for digesting, and then asking, within a bound.

    Raises:
        SettingError: the method reads all of a layer at once.
        MemoryBudgetError: the bound is below the floor.
    """
    if memory is not None and manifest.settings.method == "dense":
        raise SettingError("a memory bound needs a method that chooses what it reads; dense reads all of every layer")
    live = max(manifest.grid + manifest.call, room)  # what is asked later must fit the same bound
    return slots_for(manifest.shape, manifest.tokens, live, memory, device)


def _go_on(path: Path, model: Any, tokenizer: Any, sources: Sequence[Source], *, append: bool) -> Manifest:
    """The manifest to work on: that of an unfinished digest, of a finished one, or one with texts added."""
    manifest = Manifest.read(path)
    applied = applied_to(model)
    if applied.settings != manifest.settings or applied.reading.dense_until != manifest.dense_until:
        raise DigestError(f"{path} was begun with other settings; leave them out to go on with those it has")
    check_model(manifest, model, tokenizer, path)
    given = [(source.name, Text.hash(source.text)) for source in sources]
    known = [(text.name, text.sha256) for text in manifest.texts]
    if not append:
        if given and given != known:
            raise DigestError(f"{path} {_differs(given, known)}")
        return manifest
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
    more.write(path)
    return more


def _differs(given: list[tuple[str, str]], known: list[tuple[str, str]]) -> str:
    """How the texts given differ from those that a digest holds."""
    names = dict(known)
    changed = [name for name, sha in given if name in names and names[name] != sha]
    if changed:
        return f"holds {', '.join(changed[:3])} as it was, and it has changed since; digest into a new folder"
    return "holds other texts; add these with --append, or name a new folder"


def _paged(device: torch.device, memory: int | None) -> bool:
    """Whether pages go through a pool; else all stays on the GPU, where kernels read it in place."""
    return device.type != "cuda" or memory is not None


class _Builder:
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
        self._load()

    def run(self, on_progress: Progress | None) -> Manifest:
        """Reads everything and returns the finished manifest."""
        decoder, total = self.model.get_decoder(), len(self.tokens)
        ids = torch.from_numpy(self.tokens.ids).to(torch.int64)
        if on_progress is not None:
            on_progress(self.manifest.done, total)
        with torch.no_grad():
            for first in range(self.manifest.done, total, self.manifest.call):
                last = min(first + self.manifest.call, total)
                device = self.model.device
                positions = torch.arange(first, last, device=device)[None]
                decoder(
                    input_ids=ids[None, first:last].to(device),
                    position_ids=positions,
                    past_key_values=self.cache,
                    use_cache=True,
                )
                if last % self.manifest.grid == 0 or last == total:
                    self._flush(last)
                if on_progress is not None:
                    on_progress(last, total)
        return self.manifest

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
        pool = Pool(self.shape, _check_memory(self.manifest, memory, room, device), device)
        pool.fetch = self.store.read_pages
        pool.reserve(-(-total // self.shape.levels.chunk))
        for number, layer in self.cache.pyramids.items():
            layer.pyramid = PagedPyramid(self.shape.levels, pool, number, total)
        return pool

    def _load(self) -> None:
        """Takes up what is on disk."""
        done = 0
        for part, resident in self.store.residents():
            found = resident.on(self.model.device)
            stored = TokenPart(found.numbers("ids"), found.numbers("texts"), found.numbers("offsets"))
            check_equal(stored, self.tokens.part(part.first, part.first + part.tokens))
            for number, layer in self.cache.pyramids.items():
                if self.pool is None:
                    self._load_tokens(layer.pyramid, number, part)
                load_layer(layer.pyramid, number, part, found)
                if self.shape.recent:
                    set_recent(layer, found[f"layers.{number}.recent"][None].to(self.model.device))
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
        """Writes the segment that ends here, and lets its pages go."""
        first = self.manifest.done
        count = last - first
        name = Segment.file_of(len(self.manifest.segments), count, self.manifest.grid)
        layout = self.manifest.layout(Segment(name, first, count, ""))
        sha256 = write(
            self.path, name, layout, self.tokens.part(first, last), lambda layer: self._part(layer, first, last)
        )
        self.manifest = self.manifest.with_(
            segments=(*self.manifest.segments, Segment(name, first, count, sha256)), complete=last == len(self.tokens)
        )
        self.manifest.write(self.path)
        self.store.manifest = self.manifest
        number = len(self.manifest.segments) - 1
        self.store.learn_checks(number, self.store.resident(number))
        if self.pool is not None:
            chunk = self.shape.levels.chunk
            for layer in self.cache.pyramids:
                self.pool.release(layer, first // chunk, last // chunk)

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
        return LayerPart(
            pages.cpu(),
            list(_between(pyramid.keys, pyramid, first, last)),
            list(_between(pyramid.values, pyramid, first, last)),
            pyramid.search[0, :, :, first // chunk : last // chunk] if pyramid.search is not None else keys,
            rest,
            recent,
        )

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
                if file.name not in kept and _is_ours(file.name):
                    file.unlink()


def _between(states: list[Tensor], pyramid: Pyramid, first: int, last: int) -> Iterator[Tensor]:
    """The summaries of every level of tokens [first, last)."""
    for level, size in enumerate(pyramid.levels.sizes[1:], start=1):
        yield states[level][0, :, first // size : last // size]
