"""A layer of a cache with sliding attention: the last tokens of each row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mgam.errors import UnsupportedModelError
from mgam.integrations.transformers.rows_layer import RowsLayer
from mgam.integrations.transformers.tail import Tail

UNDO = 256
"""Tokens beyond its window that a sliding layer keeps, so that an assisted decoder can take some back."""


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
        self._count(keys)
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
