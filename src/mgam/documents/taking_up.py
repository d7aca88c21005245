"""Taking up what a digest holds: summaries, search keys and voters of one layer."""

from __future__ import annotations

from torch import Tensor

from mgam.documents.store.manifest import Segment
from mgam.documents.store.segment import Resident
from mgam.integrations.transformers.pyramid_layer import PyramidLayer
from mgam.integrations.transformers.tail import Tail
from mgam.pyramid import Pyramid


def set_recent(layer: PyramidLayer, queries: Tensor | None) -> None:
    """Gives a layer the last queries (1, Hq, R, D) before its next call."""
    votes = Tail()
    if queries is not None:
        votes.keep([queries], [queries.shape[2]], queries.shape[2])
    layer._votes = votes


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
