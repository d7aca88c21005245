"""A transformers cache whose layers hold pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from mgam.engine import Record, history
from mgam.errors import UnsupportedModelError
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule, Span


class PyramidLayer(CacheLayerMixin):
    """One layer: a pyramid, the schedule of each row, and the recent queries that may still vote."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self, levels: Levels, schedules: Sequence[Schedule] | None = None, reserve: int = 0, block: int = 128
    ) -> None:
        super().__init__()
        self.levels = levels
        self.block = block
        self.given = None if schedules is None else list(schedules)
        self.reserve = reserve
        self.record: Record | None = None
        self._start()

    def _start(self) -> None:
        self.pyramid = Pyramid(self.levels)
        if self.reserve:
            self.pyramid.reserve(self.reserve)
        self.schedules: list[Schedule] = list(self.given or [])
        self.recent: Tensor | None = None
        self.columns = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new states on; the attention function appends them, since it alone knows which are padding."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[int]:
        """Adds a call's states and returns the rows' lengths before it."""
        rows, columns = keys.shape[0], keys.shape[2]
        if not self.pyramid.lengths:
            if not self.schedules:
                self.schedules = [Schedule((Span(max(count, 1), self.block), Span(None, 1))) for count in counts]
            if rows % len(self.schedules):
                raise UnsupportedModelError(f"a cache for {len(self.schedules)} rows was given {rows}")
            repeats = rows // len(self.schedules)
            self.schedules = [schedule for schedule in self.schedules for _ in range(repeats)]
        before = list(self.pyramid.lengths) or [0] * rows
        if len(before) != rows:
            raise UnsupportedModelError(f"a cache that holds {len(before)} rows was given {rows}")
        self.pyramid.append(keys, values, counts)
        self.columns += columns
        return before

    def remember(self, queries: Tensor) -> None:
        """Keeps the last queries (B, Hq, R, D) for blocks that go on in the next call."""
        keep = max(history(schedule) for schedule in self.schedules)
        if keep:
            known = queries if self.recent is None else torch.cat((self.recent, queries), 2)
            self.recent = known[:, :, -keep:].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of a mask for the next `query_length` queries."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; given as a negative number or, as older transformers do, as the length to keep."""
        remove = -tokens_to_remove if tokens_to_remove < 0 else max(0, self.columns - tokens_to_remove)
        if remove and self.pyramid.lengths:
            self.columns -= remove
            self.pyramid.crop([remove] * len(self.pyramid.lengths))
            if self.recent is not None:
                self.recent = self.recent[:, :, : max(0, self.recent.shape[2] - remove)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows by index."""
        if self.pyramid.lengths:
            self.pyramid.select(indices)
            self.schedules = [self.schedules[row] for row in indices.tolist()]
            if self.recent is not None:
                self.recent = self.recent.index_select(0, indices.to(self.recent.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.batch_select_indices(torch.arange(len(self.pyramid.lengths)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search."""
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        """Refused: a pyramid is read by index, so moving whole layers would undo its point."""
        raise UnsupportedModelError(
            "offloading whole layers of a pyramid cache is not supported; use cache_implementation=None"
        )

    def prefetch(self) -> None:
        """Nothing to do: layers are never offloaded."""


class PyramidCache(DynamicCache):
    """The cache of a model that mgam was applied to: pyramids where attention is multi-granular, else the model's own layers.

    Args:
        model: a model that `mgam.apply` was called on.
        schedules: one schedule per row; by default the first call is a text and everything after it is generated.
        reserve: tokens to make room for at once (saves copying while a long text arrives).
    """

    def __init__(self, model: Any, schedules: Sequence[Schedule] | None = None, reserve: int = 0) -> None:
        from mgam.integrations.transformers.apply import applied_to

        super().__init__(config=model.config.get_text_config(decoder=True))
        applied = applied_to(model)
        for index in applied.layers:
            ensure_layer(self, index, applied.reading.levels, applied.settings.block, schedules, reserve)

    @property
    def pyramids(self) -> dict[int, PyramidLayer]:
        """The layers that hold pyramids, by layer index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, PyramidLayer)}

    def watch(self, record: Record | None) -> None:
        """Starts (or stops) recording what reading costs and rests on."""
        for layer in self.pyramids.values():
            layer.record = record


def ensure_layer(
    cache: Any, index: int, levels: Levels, block: int, schedules: Sequence[Schedule] | None = None, reserve: int = 0
) -> PyramidLayer:
    """The pyramid layer at `index`, put in place of an empty layer of transformers' own.

    Raises:
        UnsupportedModelError: when the cache is of a kind that cannot hold pyramids, or already holds other states.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedModelError(
            f"a {type(cache).__name__} cannot hold pyramids; pass a PyramidCache, a new DynamicCache or none"
        )
    while len(layers) <= index and getattr(cache, "layer_class_to_replicate", None) is not None:
        layers.append(cache.layer_class_to_replicate())
    layer = layers[index]
    if isinstance(layer, PyramidLayer):
        if layer.levels != levels:
            raise UnsupportedModelError(
                f"the cache was made for levels {layer.levels.sizes}, the model reads {levels.sizes}"
            )
        return layer
    if type(layer).__name__ != "DynamicLayer" or layer.get_seq_length():
        state = (
            "already holds states of another method"
            if layer.get_seq_length()
            else f"has layers of kind {type(layer).__name__}"
        )
        raise UnsupportedModelError(
            f"the cache given {state}; pass mgam's PyramidCache(model), a new DynamicCache, or none "
            "(static, quantised and offloaded caches are not supported)"
        )
    layers[index] = PyramidLayer(levels, schedules, reserve, block)
    return layers[index]
