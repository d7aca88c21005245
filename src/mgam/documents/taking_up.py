"""Taking up what a digest holds: summaries and search keys of all layers, voters of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mgam.documents.paged import PagedPyramid
from mgam.documents.pool import Pool
from mgam.documents.store.layout import Shape
from mgam.documents.store.manifest import Segment
from mgam.documents.store.segment import Resident
from mgam.integrations.transformers.cache import PyramidCache
from mgam.integrations.transformers.pyramid_layer import PyramidLayer
from mgam.integrations.transformers.tail import Tail
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule


def prepare(model: Any, shape: Shape, tokens: int, slots: int) -> tuple[Pool, PyramidCache]:
    """A pool of pages, and a cache over it with room for so many tokens; nothing is in them yet."""
    pool = Pool(shape, slots, model.device)
    cache = PyramidCache(model, [Schedule.uniform(1)])
    pool.reserve(-(-tokens // shape.levels.chunk))
    for number, layer in cache.pyramids.items():
        layer.pyramid = PagedPyramid(shape.levels, pool, number, tokens)
        layer.lazy_initialization(pool.keys, pool.values)
    return pool, cache


def set_recent(layer: PyramidLayer, queries: Tensor | None) -> None:
    """Gives a layer the last queries (1, Hq, R, D) before its next call."""
    votes = Tail()
    if queries is not None:
        votes.keep([queries], [queries.shape[2]], queries.shape[2])
    layer._votes = votes


def load_segment(pyramids: Mapping[int, Pyramid], part: Segment, found: Resident) -> None:
    """Puts summaries and search keys of a segment into the pyramids of all layers, which have room for them."""
    levels = found.layout.shape.levels
    for level, size in enumerate(levels.sizes[1:], start=1):
        span = slice(part.first // size, (part.first + part.tokens) // size)
        for kind in ("keys", "values"):
            for layer, new in enumerate(found.states(f"{kind}.{level}").unbind()):
                states = pyramids[layer].keys if kind == "keys" else pyramids[layer].values
                states[level][0, :, span] = new
    span = slice(part.first // levels.chunk, (part.first + part.tokens) // levels.chunk)
    for layer, new in enumerate(found.states("search").unbind()):
        search = pyramids[layer].search
        assert search is not None
        search[0, :, :, span] = new
    for pyramid in pyramids.values():
        pyramid.lengths = [part.first + part.tokens]
