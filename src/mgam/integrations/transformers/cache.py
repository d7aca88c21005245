"""A transformers cache whose layers hold pyramids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from mgam.engine import Plan, Record, history
from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.tail import Tail
from mgam.levels import Levels
from mgam.policies import Policy
from mgam.pyramid import Pyramid
from mgam.schedule import Schedule, Span

if TYPE_CHECKING:
    from mgam.integrations.transformers.apply import Applied

UNDO = 256
"""Tokens beyond its window that a sliding layer keeps, so that an assisted decoder can take some back."""
SPARE = 16
"""Tokens at the end of a prompt that a cache can be cropped by while all voters of the query block there are known."""


@dataclass(frozen=True)
class Bookmark:
    """A place in a cache to go back to: one entry a layer."""

    layers: tuple[Any, ...]


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

    def bookmark(self) -> Any:
        """What `go_back` needs to return here."""
        raise NotImplementedError

    def go_back(self, place: Any) -> None:
        """Returns to where `bookmark` was called."""
        raise NotImplementedError

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
        method: str = "mgam",
        stateful: bool = False,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.positions = positions
        self.method = method
        self.stateful = stateful
        """Whether the method forgets tokens or keeps what it learnt on the way: then no other can go on from here."""
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
        self._ended: tuple[Tail, list[int]] | None = None
        self._cropped = False
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
        """Keeps the last queries (B, Hq, R, D) for blocks that go on in the next call.

        When no block to come has voters, those of the last ones are set aside, for a crop that opens one again.
        """
        lengths = self.pyramid.lengths
        before = [length - count for length, count in zip(lengths, counts, strict=True)]
        most = self._history(lengths)
        if not most and not self._history(before):
            return
        keep = most or SPARE + self._history([schedule.prompt - 1 for schedule in self.schedules])
        if self._votes.states is None and list(counts) != lengths:
            keep = min(keep, *counts)  # earlier queries are gone: columns without one must not look as if they had one
        states, held = self._votes.joined([queries.detach()], counts)
        self._votes.keep(states, held, keep)
        self._ended = None if most else (self._votes, list(lengths))
        if not most:
            self._votes = Tail()

    def reset(self) -> None:
        """Forgets everything."""
        self._start()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; given as a negative number or, as older transformers do, as the length to keep."""
        remove = self._to_remove(tokens_to_remove)
        if remove and self.pyramid.lengths:
            self.pyramid.crop([remove] * len(self.pyramid.lengths))
            self._crop_votes(remove)
            self._forget_columns(remove)
            if self._beams is not None:
                self._beams = self._beams[0], list(map(min, self._beams[1], self.pyramid.lengths))

    def _history(self, places: Sequence[int]) -> int:
        return max(history(schedule, place) for schedule, place in zip(self.schedules, places, strict=True))

    def _crop_votes(self, remove: int) -> None:
        self._votes.crop(remove)
        self._cropped = True
        if self._ended is None:
            return
        votes, ends = self._ended
        beyond = {end - length for end, length in zip(ends, self.pyramid.lengths, strict=True)}
        if max(beyond) > 0:
            self._votes, self._ended = Tail(), None
            if len(beyond) == 1:
                self._votes = votes
                votes.crop(beyond.pop())

    def check_votes(self, plan: Plan) -> None:
        """Refuses a call after `crop` whose query blocks began before it, with voters that are no longer kept.

        Raises:
            UnsupportedModelError: without these they would choose otherwise than in a text that was not cropped.
        """
        if not self._cropped:
            return
        held = torch.tensor(self._votes.held if self.recent is not None else [0] * len(plan.before))
        for dense, blocks in plan.groups:
            if not dense and bool((blocks.vote_from < (plan.before - held)[blocks.row]).any()):
                raise UnsupportedModelError(
                    "the cache was cropped into a query block, and the queries that vote for the rest of it are not "
                    "kept; crop to where a block begins, or go back with bookmark() and go_back()"
                )

    def bookmark(self) -> Any:
        """Where the layer stands; a copy of the whole layer where the method forgets, else next to nothing."""
        if self.stateful:
            return copy.deepcopy(self)
        state = {name: copy.copy(getattr(self, name)) for name in ("schedules", "ahead", "next_position")}
        votes, ended = copy.copy(self._votes), copy.deepcopy(self._ended)
        return self.columns, list(self.lengths), votes, ended, state

    def go_back(self, place: Any) -> None:
        """Returns to where `bookmark` was called, with the voters of then."""
        if isinstance(place, PyramidLayer):
            record = self.record
            self.__dict__.update(copy.deepcopy(place).__dict__)
            self.record = record
            return
        columns, lengths, votes, ended, state = place
        if len(lengths) != len(self.lengths) or columns > self.columns:
            raise UnsupportedModelError(
                f"the cache holds {len(self.lengths)} rows of {self.columns} columns, the bookmark {len(lengths)} of "
                f"{columns}: rows were repeated or forgotten since it was made"
            )
        self.pyramid.crop([new - old for new, old in zip(self.lengths, lengths, strict=True)])
        self.columns, self._votes, self._beams = columns, copy.copy(votes), None
        self._ended = copy.deepcopy(ended)
        self.__dict__.update(copy.deepcopy(state))

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
        if self._ended is not None:
            self._ended[0].select(rows)
            self._ended = self._ended[0], [self._ended[1][row] for row in rows.tolist()]


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

    def bookmark(self) -> Any:
        """Where the layer stands: it holds few tokens, so all of them."""
        return copy.deepcopy(self)

    def go_back(self, place: Any) -> None:
        """Returns to where `bookmark` was called."""
        self.__dict__.update(copy.deepcopy(place).__dict__)

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
    stateful = _keeps_state(applied.reading.policy)
    if not isinstance(layer, PyramidLayer):
        _check_empty(layer)
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
    if layer.method != settings.method and (layer.stateful or stateful):
        one = layer.method if layer.stateful else settings.method
        raise UnsupportedModelError(
            f"the cache was made for method {layer.method!r}, the model reads with {settings.method!r}: {one} forgets "
            "tokens or learns while it reads, so that no other can go on from its cache, nor it from theirs"
        )
    return layer


def _keeps_state(policy: Policy) -> bool:
    return hasattr(policy, "observe") or hasattr(policy, "evict")


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
