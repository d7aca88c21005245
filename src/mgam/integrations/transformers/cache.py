"""A transformers cache whose layers hold pyramids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from mgam.engine import Record, history
from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.tail import Tail
from mgam.levels import Levels
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule, Span

UNDO = 256
"""Tokens beyond its window that a sliding layer keeps, so that an assisted decoder can take some back."""


class RowsLayer(CacheLayerMixin):
    """A layer whose rows each begin at their first real token, whatever columns they came in."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0
        self.ahead: list[int] = []
        """Tokens of each row that were read before the columns that hold them come by."""
        self.next_position: list[int | None] = []
        """Where each row's next token must stand; None before the first."""
        self.announced = False
        self.is_initialized = False

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds; empty before the first call. Each kind of layer says it in its own way."""
        raise NotImplementedError

    def _select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index; each kind of layer does it in its own way."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new states on; the attention function appends them, since it alone knows which are padding.

        Raises:
            UnsupportedModelError: when the layer that calls is not one that mgam was applied to.
        """
        if not self.announced:
            raise UnsupportedModelError(
                "this cache was filled by a model that mgam was applied to, and is now given to one that it is not "
                "applied to; call mgam.apply(model) first, or pass a new cache"
            )
        self.announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.device != self.device or key_states.dtype != self.dtype:
            raise UnsupportedModelError(
                f"the cache holds {self.dtype} on {self.device}, the model now gives {key_states.dtype} on "
                f"{key_states.device}; begin with a new cache after moving or casting a model"
            )
        return key_states, value_states

    def _open(self, keys: Tensor, counts: Sequence[int], like: Tensor | None) -> list[int]:
        """Checks a call's keys against what is held, counts its columns, and returns the rows' lengths before it."""
        rows = keys.shape[0]
        before = list(self.lengths) or [0] * rows
        if len(before) != rows:
            raise UnsupportedModelError(
                f"a cache that holds {len(before)} rows was given {rows}; repeat its rows with batch_repeat_interleave"
            )
        if like is not None and (like.shape[1], like.shape[3]) != (keys.shape[1], keys.shape[3]):
            raise UnsupportedModelError(
                f"the cache holds {like.shape[1]} heads of {like.shape[3]} dimensions, the model gives "
                f"{keys.shape[1]} of {keys.shape[3]}: it is another model's"
            )
        self.columns += keys.shape[2]
        self.ahead = [0] * rows
        return before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of a mask for the next `query_length` queries."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def _to_remove(self, tokens: int) -> int:
        """What `crop` is to remove: given as a negative number or, as older transformers do, as the length to keep."""
        return min(self.columns, -tokens if tokens < 0 else max(0, self.columns - tokens) if tokens else 0)

    def _forget_columns(self, remove: int) -> None:
        self.columns -= remove
        self.next_position = [
            None if place is None or not length else place - remove
            for place, length in zip(self.next_position, self.lengths, strict=False)
        ]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows by index."""
        if self.lengths:
            self._select(indices)
            chosen = indices.tolist()
            self.ahead = [self.ahead[row] for row in chosen] if self.ahead else []
            self.next_position = [self.next_position[row] for row in chosen] if self.next_position else []

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

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


class PyramidLayer(RowsLayer):
    """One layer: a pyramid, the schedule of each row, and the recent queries that may still vote."""

    is_sliding = False

    def __init__(
        self,
        levels: Levels,
        schedules: Sequence[Schedule] | None = None,
        reserve: int = 0,
        block: int = 128,
        positions: str = "granular",
    ) -> None:
        super().__init__()
        self.levels = levels
        self.positions = positions
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
        self._votes = Tail()
        self._beams: tuple[int, list[int]] | None = None
        self.columns = 0
        self.ahead, self.next_position = [], []
        self.is_initialized = False

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds; empty before the first call."""
        return self.pyramid.lengths

    @property
    def recent(self) -> Tensor | None:
        """The last queries of each row (B, Hq, R, D), for blocks that began before the call."""
        return None if self._votes.states is None else self._votes.states[0]

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> list[int]:
        """Adds a call's states and returns the rows' lengths before it."""
        rows = keys.shape[0]
        before = self._open(keys, counts, self.pyramid.keys[0] if self.pyramid.lengths else None)
        if not self.pyramid.lengths:
            if not self.schedules:
                self.schedules = [Schedule((Span(max(count, 1), self.block), Span(None, 1))) for count in counts]
            if rows % len(self.schedules):
                raise UnsupportedModelError(f"a cache for {len(self.schedules)} rows was given {rows}")
            repeats = rows // len(self.schedules)
            self.schedules = [schedule for schedule in self.schedules for _ in range(repeats)]
            self._beams = (repeats, list(counts)) if repeats > 1 else None
        self.pyramid.append(keys, values, counts)
        return before

    def remember(self, queries: Tensor, counts: Sequence[int]) -> None:
        """Keeps the last queries (B, Hq, R, D) for blocks that go on in the next call."""
        most = max(
            history(schedule, length) for schedule, length in zip(self.schedules, self.pyramid.lengths, strict=True)
        )
        if most and self._votes.states is None and list(counts) != self.pyramid.lengths:
            most = min(most, *counts)  # earlier queries are gone: columns without one must not look as if they had one
        states, held = self._votes.joined([queries.detach()], counts) if most else ((), [0] * len(counts))
        self._votes.keep(states, held, most)

    def reset(self) -> None:
        """Forgets everything."""
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; given as a negative number or, as older transformers do, as the length to keep."""
        remove = self._to_remove(tokens_to_remove)
        if remove and self.pyramid.lengths:
            self.pyramid.crop([remove] * len(self.pyramid.lengths))
            self._votes.crop(remove)
            self._forget_columns(remove)
            if self._beams is not None:
                self._beams = self._beams[0], list(map(min, self._beams[1], self.pyramid.lengths))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self._beams = (repeats, list(self.pyramid.lengths)) if self.pyramid.lengths else None

    def _select(self, rows: Tensor) -> None:
        chosen, shared = rows.tolist(), 0
        if self._beams is not None:
            group, lengths = self._beams
            if len(chosen) == len(lengths) and all(row // group == place // group for place, row in enumerate(chosen)):
                shared = min(lengths)
            else:
                self._beams = None
        if shared:
            self.pyramid.select(rows, shared)
        else:
            self.pyramid.select(rows)
        self.schedules = [self.schedules[row] for row in rows.tolist()]
        self._votes.select(rows)


class RecentLayer(RowsLayer):
    """A layer with sliding attention: the last keys and values of each row."""

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self._tail = Tail()
        self._lengths: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row saw; empty before the first call."""
        return self._lengths

    def append(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Adds a call's states; returns what its queries may read.

        Returns keys and values (B, H, K + L, D), and how many of their last columns each row holds.
        """
        before = self._open(keys, counts, None if self._tail.states is None else self._tail.states[0])
        states, held = self._tail.joined((keys, values), counts)
        self._tail.keep(states, held, self.window - 1 + UNDO)
        self._lengths = [old + count for old, count in zip(before, counts, strict=True)]
        reach = self.window - 1 + keys.shape[2]
        return states[0][:, :, -reach:], states[1][:, :, -reach:], [min(count, reach) for count in held]

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__(self.window)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns.

        Raises:
            UnsupportedModelError: when more is taken back than is kept beyond the window.
        """
        remove = self._to_remove(tokens_to_remove)
        if not remove or not self._lengths:
            return
        left = [max(0, length - remove) for length in self._lengths]
        kept = [max(0, held - remove) for held in self._tail.held]
        if any(have < min(length, self.window - 1) for have, length in zip(kept, left, strict=True)):
            raise UnsupportedModelError(
                f"a cache with sliding layers cannot forget {remove} tokens: it keeps {UNDO} beyond its window; copy "
                "the cache (copy.deepcopy) before the tokens that are to be forgotten"
            )
        self._tail.crop(remove)
        self._lengths = left
        self._forget_columns(remove)

    def _select(self, rows: Tensor) -> None:
        self._tail.select(rows)
        self._lengths = [self._lengths[row] for row in rows.tolist()]


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
                ensure_pyramid(
                    self,
                    index,
                    applied.reading.levels,
                    applied.settings.block,
                    applied.settings.positions,
                    schedules,
                    reserve,
                )

    @property
    def pyramids(self) -> dict[int, PyramidLayer]:
        """The layers that hold pyramids, by layer index."""
        return {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, PyramidLayer)}

    def watch(self, record: Record | None) -> None:
        """Starts (or stops) recording what reading costs and rests on."""
        for layer in self.pyramids.values():
            layer.record = record


def ensure_pyramid(
    cache: Any,
    index: int,
    levels: Levels,
    block: int,
    positions: str,
    schedules: Sequence[Schedule] | None = None,
    reserve: int = 0,
) -> PyramidLayer:
    """The pyramid layer at `index`, put in place of an empty layer of transformers' own.

    Raises:
        UnsupportedModelError: when the cache is of a kind that cannot hold pyramids, or already holds other states.
    """
    layer = _layer(cache, index)
    if isinstance(layer, PyramidLayer):
        if layer.levels != levels:
            raise UnsupportedModelError(
                f"the cache was made for levels {layer.levels.sizes}, the model reads {levels.sizes}"
            )
        if layer.positions != positions:
            raise UnsupportedModelError(
                f"the cache was made for {layer.positions} positions, the model reads with {positions} ones"
            )
        return layer
    _check_empty(layer)
    cache.layers[index] = PyramidLayer(levels, schedules, reserve, block, positions)
    return cache.layers[index]


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
