"""Taking up what stays in memory of a digest: tokens, summaries and search keys of all layers, voters of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgam.documents.paged import PagedPyramid
from mgam.documents.pool import Pool
from mgam.documents.store.layout import Shape
from mgam.documents.store.manifest import Segment
from mgam.documents.store.segment import Resident
from mgam.documents.store.store import Store
from mgam.documents.tokens import Tokens
from mgam.errors import DigestError
from mgam.integrations.transformers.cache import PyramidCache
from mgam.integrations.transformers.pyramid_layer import PyramidLayer
from mgam.integrations.transformers.tail import Tail
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule


@dataclass(frozen=True)
class Layers:
    """Summaries and search keys of all layers side by side, so that a segment is taken up in a few copies.

    Shapes: keys[l-1], values[l-1] (layers, 1, H, n, D); search (layers, 1, H, S, C, D). The pyramids hold views.
    """

    pyramids: list[Pyramid]
    keys: list[Tensor]
    values: list[Tensor]
    search: Tensor

    @classmethod
    def of(cls, pyramids: Sequence[Pyramid], tokens: int) -> Layers:
        """Room for so many tokens in pyramids that were begun and hold no summaries yet."""
        first, levels = pyramids[0], pyramids[0].levels
        assert first.search is not None
        chunks = -(-max(tokens, 1) // levels.chunk)

        def room(like: Tensor, entries: int) -> Tensor:
            return like.new_empty(len(pyramids), *like.shape[:-2], entries, like.shape[-1])

        counts = [chunks * levels.chunk // size for size in levels.sizes[1:]]
        keys = [room(like, count) for like, count in zip(first.keys[1:], counts, strict=True)]
        values = [room(like, count) for like, count in zip(first.values[1:], counts, strict=True)]
        search = room(first.search, chunks)
        for number, pyramid in enumerate(pyramids):
            pyramid.keys[1:] = [states[number] for states in keys]
            pyramid.values[1:] = [states[number] for states in values]
            pyramid.search = search[number]
        return cls(list(pyramids), keys, values, search)

    def load(self, part: Segment, found: Resident) -> None:
        """Puts summaries and search keys of a segment into all layers."""
        levels = found.layout.shape.levels
        for level, size in enumerate(levels.sizes[1:], start=1):
            span = slice(part.first // size, (part.first + part.tokens) // size)
            for kind, states in (("keys", self.keys), ("values", self.values)):
                states[level - 1][:, 0, :, span] = found.states(f"{kind}.{level}")
        span = slice(part.first // levels.chunk, (part.first + part.tokens) // levels.chunk)
        self.search[:, 0, :, :, span] = found.states("search")
        for pyramid in self.pyramids:
            pyramid.lengths = [part.first + part.tokens]


def prepare(model: Any, shape: Shape, tokens: int, slots: int) -> tuple[Pool, PyramidCache, Layers]:
    """A pool of pages, a cache over it and its layers, with room for so many tokens; nothing is in them yet."""
    pool = Pool(shape, slots, model.device)
    cache = PyramidCache(model, [Schedule.uniform(1)])
    pool.reserve(-(-tokens // shape.levels.chunk))
    for number, layer in cache.pyramids.items():
        layer.pyramid = PagedPyramid(shape.levels, pool, number, 0)
        layer.stateful = False  # pages forget no token, whatever the method: to go back takes no copy
        layer.lazy_initialization(pool.keys, pool.values)
    return pool, cache, Layers.of([layer.pyramid for layer in cache.pyramids.values()], tokens)


def set_recent(layer: PyramidLayer, queries: Tensor | None) -> None:
    """Gives a layer the last queries (1, Hq, R, D) before its next call."""
    votes = Tail()
    if queries is not None:
        votes.keep([queries], [queries.shape[2]], queries.shape[2])
    layer._votes = votes


def take_up(store: Store, parts: Iterator[tuple[Segment, Resident]], cache: PyramidCache, together: Layers) -> Tokens:
    """Takes up all that stays in memory; returns the tokens."""
    shape, layers = store.manifest.shape, cache.pyramids
    numbers: list[tuple[Any, Any, Any]] = []
    recent: dict[int, Tensor | None] = dict.fromkeys(layers)
    for part, found in parts:
        numbers.append((found.numbers("ids"), found.numbers("texts"), found.numbers("offsets")))
        together.load(part, found)
        done = part.first + part.tokens
        for number, layer in layers.items():
            if done % shape.levels.chunk:
                rest = found[f"layers.{number}.rest"]
                layer.pyramid.put(slice(None), done // shape.levels.chunk * shape.levels.chunk, rest[:1], rest[1:])
            if shape.recent:
                new, old = found[f"layers.{number}.recent"][None], recent[number]
                recent[number] = (new if old is None else torch.cat((old, new), 2))[:, :, -shape.recent :].clone()
            layer.columns = done
    for number, layer in layers.items():
        set_recent(layer, recent[number])
    ids, texts, offsets = (np.concatenate(columns) for columns in zip(*numbers, strict=True))
    if ((texts >= len(store.manifest.texts)) | (texts < -1)).any():
        raise DigestError(f"{store.folder} cannot be right: it has tokens of texts that it does not hold")
    return Tokens(ids, texts, offsets)
