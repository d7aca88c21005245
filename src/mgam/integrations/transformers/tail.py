"""The last states of rows that grow by unequal numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tail:
    """The last states of each row, at the right of its columns.

    Shapes: each of `states` (B, H, K, D), the same K for all; the last `held[b]` columns of row b are set.
    """

    def __init__(self) -> None:
        self.states: tuple[Tensor, ...] | None = None
        self.held: list[int] = []

    def joined(self, new: Sequence[Tensor], counts: Sequence[int]) -> tuple[tuple[Tensor, ...], list[int]]:
        """What is kept, followed by the last `counts[b]` columns of the new states (B, H, L, D) of each row b.

        Returns the states (B, H, K + L, D) and how many of their last columns each row holds.
        """
        columns = new[0].shape[2]
        if self.states is None:
            return tuple(new), list(counts)
        held = [old + count for old, count in zip(self.held, counts, strict=True)]
        kept = self.states[0].shape[2]
        both = tuple(torch.cat(pair, 2) for pair in zip(self.states, new, strict=True))
        if set(counts) == {columns}:
            return both, held
        place = torch.arange(kept + columns)
        moved = (place - (columns - torch.tensor(counts))[:, None]).clamp_min(0)
        index = torch.where(place >= kept + columns - torch.tensor(counts)[:, None], place, moved).to(new[0].device)
        index = index[:, None, :, None]
        return tuple(states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3])) for states in both), held

    def keep(self, states: Sequence[Tensor], held: Sequence[int], most: int) -> None:
        """Keeps the last `most` columns of states that `joined` made."""
        if not most:
            self.states, self.held = None, [0] * len(held)
            return
        if self.states is None:
            # Rows may have been there before: columns that are not theirs must not look as if they were.
            most = min(most, max(held, default=0))
        self.states = tuple(part[:, :, -most:].clone() if most else part[:, :, :0] for part in states)
        self.held = [min(most, count) for count in held]

    def crop(self, remove: int) -> None:
        """Forgets the last columns of every row."""
        if self.states is not None:
            left = max(0, self.states[0].shape[2] - remove)
            self.states = tuple(part[:, :, :left] for part in self.states)
            self.held = [max(0, count - remove) for count in self.held]

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows by index."""
        if self.states is not None:
            self.states = tuple(part.index_select(0, rows.to(part.device)) for part in self.states)
            self.held = [self.held[row] for row in rows.tolist()]
