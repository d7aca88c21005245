"""What every launch needs: rotary tables, descriptions of memory for the copy engine, and small numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mgam.attend.triton.lists import Lists
from mgam.kernels import power_of_2
from mgam.positions import Positions, Rotary

STEP = 64
"""Tokens whose turns are read from a table; a true position is a number of these steps and what is left."""


@dataclass(frozen=True)
class Turn:
    """Rotary tables for a launch; `pairs` 0 means that nothing is rotated."""

    cos: Tensor
    sin: Tensor
    pairs: int
    anchor: int
    rotary: Rotary | None = None

    @classmethod
    def of(
        cls, positions: Positions, lists: Lists, tokens: int, device: torch.device, dtype: torch.dtype = torch.float16
    ) -> Turn:
        """Tables that reach every rank; dense attention takes true positions and so needs `tokens` of them.

        Angles are worked out in float32 at least; for half-precision keys the tables are then kept in float16, whose
        error is an eighth of what rounding a rotated bfloat16 key costs, and which halves what each tile loads.
        """
        if positions.kind != "granular":
            none = torch.empty(1, dtype=torch.float32, device=device)
            return cls(none, none, 0, 0)
        assert positions.rotary is not None
        limit = max(tokens, positions.rotary.limit) if lists.bare else positions.rotary.limit
        if dtype == torch.float32:
            cos, sin = positions.rotary.table(device, dtype, limit)
        else:
            cos, sin = positions.rotary.half_table(device, limit)
        return cls(cos, sin, cos.shape[-1], positions.anchor, positions.rotary)

    @property
    def composes(self) -> bool:
        """Whether keys may be turned to true positions first and to their ranks after."""
        whole = self.pairs > 0 and self.pairs & (self.pairs - 1) == 0 and self.cos.shape[0] >= STEP
        return whole and self.rotary is not None and self.rotary.compose(self.cos.device)

    def far(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Turns by whole steps that reach the last of `tokens`."""
        assert self.rotary is not None
        return self.rotary.turns(self.cos.device, STEP, tokens // STEP + 1)


def copyable(states: Tensor) -> bool:
    """Whether the copy engine can take tiles of these states (B, H, n, D)."""
    if states.is_cuda and torch.cuda.get_device_capability(states.device) < (9, 0):
        return False
    step = states.element_size()
    aligned = all(stride * step % 16 == 0 for stride in states.stride()[:3])
    return aligned and states.data_ptr() % 16 == 0 and states.stride(3) == 1 and states.numel() > 0


def described(states: Tensor, entries: int, columns: int) -> TensorDescriptor:
    """Tiles of `entries` neighbours of one row and head, `columns` wide."""
    return TensorDescriptor(states, list(states.shape), list(states.stride()), [1, 1, entries, columns])


def strides(states: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Steps of rows, heads and entries, per level."""
    return tuple((level.stride(0), level.stride(1), level.stride(2)) for level in states)


def biases(lists: Lists) -> tuple[float, ...]:
    """Log mass of an entry in base 2, per level."""
    return tuple(lists.mass * math.log2(size) for size in lists.levels.sizes)


def block(width: int) -> int:
    """Columns of a tile that holds `width` of them: a power of two, at least 16."""
    return max(16, power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """How products are taken: exactly for float32, which only tests use."""
    return "ieee" if dtype == torch.float32 else "tf32"
