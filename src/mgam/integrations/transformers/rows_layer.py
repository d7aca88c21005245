"""What all layers of a cache share: rows that begin at their first real token, whatever columns they came in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from mgam.errors import UnsupportedModelError


class ColumnsLayer(CacheLayerMixin):
    """A layer that counts the columns that came by, padding included, whatever it keeps of them."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows that are held; 0 before the first call."""

    @abstractmethod
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows for beam search."""
        self.batch_select_indices(beam_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of a mask for the next `query_length` queries."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class RowsLayer(ColumnsLayer):
    """A layer whose rows each begin at their first real token, whatever columns they came in."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.ahead: list[int] = []
        """Tokens of each row that were read before the columns that hold them come by."""
        self.next_position: list[int | None] = []
        """Where each row's next token must stand; None before the first."""
        self.announced = False
        self.is_initialized = False

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens that each row holds; empty before the first call."""

    @property
    def rows(self) -> int:
        """Rows that are held; 0 before the first call."""
        return len(self.lengths)

    @abstractmethod
    def bookmark(self) -> Any:
        """What `go_back` needs to return here."""

    @abstractmethod
    def go_back(self, place: Any) -> None:
        """Returns to where `bookmark` was called."""

    @abstractmethod
    def _select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""

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
        """Checks a call's keys against what is held, and returns the rows' lengths before it."""
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
        return before

    def _count(self, keys: Tensor) -> None:
        """Counts a call's columns, once its states are kept: what stops before leaves no columns without tokens."""
        self.columns += keys.shape[2]
        self.ahead = [0] * keys.shape[0]

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

    def offload(self) -> None:
        """Refused: a pyramid is read by index, so moving whole layers would undo its point."""
        raise UnsupportedModelError(
            "offloading whole layers of a pyramid cache is not supported; use cache_implementation=None"
        )

    def prefetch(self) -> None:
        """Nothing to do: layers are never offloaded."""
