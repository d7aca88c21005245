"""A transformers cache whose layers hold pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache

from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.pyramid_layer import PyramidLayer
from mgam.integrations.transformers.recent_layer import RecentLayer
from mgam.integrations.transformers.rows_layer import RowsLayer
from mgam.policies.base import keeps_state
from mgam.record import Record
from mgam.schedule import Schedule

if TYPE_CHECKING:
    from mgam.integrations.transformers.apply import Applied


@dataclass(frozen=True)
class Bookmark:
    """A place in a cache to go back to: one entry a layer."""

    layers: tuple[Any, ...]


class PyramidCache(DynamicCache):
    """The cache of a model that mgam was applied to: pyramids where attention is multi-granular, else the last tokens.

    It can be copied (`copy.deepcopy`): read a prompt once, then give each question a copy.

    Args:
        model: a model that `mgam.apply` was called on.
        schedules: one schedule per row; by default the first call is a text and everything after it is generated.
        reserve: tokens to make room for at once (saves copying while a long text arrives).
    """

    def __init__(self, model: Any, schedules: Sequence[Schedule] | None = None, reserve: int = 0) -> None:
        from mgam.integrations.transformers.apply import applied_to

        super().__init__(config=model.config.get_text_config(decoder=True))
        applied = applied_to(model)
        for index, window in applied.windows.items():
            if window is not None:
                ensure_recent(self, index, window)
            else:
                ensure_pyramid(self, index, applied, schedules, reserve)

    @property
    def pyramids(self) -> dict[int, PyramidLayer]:
        """The layers that hold pyramids, by layer index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, PyramidLayer)}

    def bookmark(self) -> Bookmark:
        """Where the cache stands now; `go_back` returns there after questions were asked and answers generated.

        Costs next to nothing, except for methods that forget tokens, of which everything is copied.
        """
        return Bookmark(tuple(layer.bookmark() for layer in self._rows))

    def go_back(self, place: Bookmark) -> None:
        """Forgets everything since a bookmark; what is read next gives what it gave right after it.

        Raises:
            UnsupportedModelError: rows were repeated or dropped since then.
        """
        for layer, there in zip(self._rows, place.layers, strict=True):
            layer.go_back(there)

    @property
    def _rows(self) -> list[RowsLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowsLayer)]

    def watch(self, record: Record | None) -> None:
        """Starts (or stops) recording what reading costs and rests on."""
        for layer in self.pyramids.values():
            layer.record = record


def ensure_pyramid(
    cache: Any, index: int, applied: Applied, schedules: Sequence[Schedule] | None = None, reserve: int = 0
) -> PyramidLayer:
    """The pyramid layer at `index`, put in place of an empty layer of transformers' own.

    Raises:
        UnsupportedModelError: when the cache is of a kind that cannot hold pyramids, or already holds other states.
    """
    layer = _layer(cache, index)
    levels, settings = applied.reading.levels, applied.settings
    if not isinstance(layer, PyramidLayer):
        _check_empty(layer)
        stateful = keeps_state(applied.reading.policy)
        layer = PyramidLayer(levels, schedules, reserve, settings.block, settings.positions, settings.method, stateful)
        cache.layers[index] = layer
        return layer
    if layer.levels != levels:
        raise UnsupportedModelError(
            f"the cache was made for levels {layer.levels.sizes}, the model reads {levels.sizes}"
        )
    if layer.positions != settings.positions:
        raise UnsupportedModelError(
            f"the cache was made for {layer.positions} positions, the model reads with {settings.positions} ones"
        )
    if layer.method != settings.method and (layer.stateful or keeps_state(applied.reading.policy)):
        one = layer.method if layer.stateful else settings.method
        raise UnsupportedModelError(
            f"the cache was made for method {layer.method!r}, the model reads with {settings.method!r}: {one} forgets "
            "tokens or learns while it reads, so that no other can go on from its cache, nor it from theirs"
        )
    return layer


def ensure_recent(cache: Any, index: int, window: int) -> RecentLayer:
    """The layer of a sliding one at `index`, put in place of an empty layer of transformers' own.

    Raises:
        UnsupportedModelError: as `ensure_pyramid` does.
    """
    layer = _layer(cache, index)
    if isinstance(layer, RecentLayer):
        if layer.window != window:
            raise UnsupportedModelError(
                f"the cache was made for a window of {layer.window} tokens, layer {index} slides over {window}"
            )
        return layer
    _check_empty(layer)
    cache.layers[index] = RecentLayer(window)
    return cache.layers[index]


def _layer(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedModelError(
            f"a {type(cache).__name__} cannot hold pyramids; pass a PyramidCache, a new DynamicCache or none"
        )
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError("an offloading cache cannot hold pyramids; pass a PyramidCache or none")
    while len(layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        layers.append(cache.layer_class_to_replicate())
    if len(layers) <= index:
        raise UnsupportedModelError(f"the cache has {len(layers)} layers, the model more: it is another model's")
    return layers[index]


def _check_empty(layer: Any) -> None:
    known = type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
    if not known or layer.get_seq_length():
        state = f"has layers of kind {type(layer).__name__}" if not known else "already holds states of another method"
        raise UnsupportedModelError(
            f"the cache given {state}; pass mgam's PyramidCache(model), a new DynamicCache, or none "
            "(static, quantised and offloaded caches are not supported)"
        )
