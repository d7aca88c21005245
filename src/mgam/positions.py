"""Positions: true ones (absolute), or an entry's rank in its cover (granular)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.lasting import lasting

PositionKind = Literal["absolute", "granular"]

MOST_RANKS = 32768
"""Ranks in use at most, however long the trained window: covers are far smaller."""
TABLE_STEP = 4096
"""A table that must reach beyond the trained window (dense attention there) grows by this many positions at a time."""


@dataclass(eq=False)
class Rotary:
    """Rotary tables of a model for positions 0 ... limit-1, filled on first use. One equals itself alone.

    `tables(positions)` returns cos and sin, each (P, R) with R <= head dim (partial rotation), scaled by the model.
    """

    tables: Callable[[Tensor], tuple[Tensor, Tensor]]
    limit: int
    """Positions the model was trained for; ranks must stay below it."""

    _kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _turns: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _speed: tuple[Tensor, float] | None = field(default=None, repr=False)

    @classmethod
    def plain(cls, dim: int, limit: int, theta: float = 10000.0) -> Rotary:
        """The rotation of RoFormer (Su et al. 2021, eq. 34) over `dim` dimensions."""

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
            angles = positions.to(torch.float64)[:, None] * frequencies
            return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), angles.sin()), -1)

        return cls(tables, limit)

    def table(self, device: torch.device, dtype: torch.dtype, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, each (limit, R/2), in float32 or float64: the first half of each row (the second repeats it)."""
        limit = self.limit if limit is None else limit
        key = (device, torch.promote_types(dtype, torch.float32))
        if key not in self._kept or self._kept[key][0].shape[0] < limit:
            reach = self.limit if limit <= self.limit else -(-limit // TABLE_STEP) * TABLE_STEP
            with lasting():
                cos, sin = self.tables(torch.arange(reach, device=device))
                half = cos.shape[-1] // 2
                self._kept[key] = (cos[:, :half].to(key[1]).contiguous(), sin[:, :half].to(key[1]).contiguous())
        cos, sin = self._kept[key]
        return cos[:limit], sin[:limit]

    def turns(self, device: torch.device, step: int, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (at least count, R/2) float32, of turns by 0, step, 2 step, ... tokens: of length one, and
        as exact at a million tokens as at the first, since angles are worked out in float64.

        Only for tables that `compose`.
        """
        key = (device, step)
        if key not in self._turns or self._turns[key][0].shape[0] < count:
            if not self.compose(device):
                raise SettingError(
                    "these rotary tables do not turn step by step; they cannot reach beyond their window"
                )
            assert self._speed is not None
            reach = -(-count // TABLE_STEP) * TABLE_STEP
            with lasting():
                places = torch.arange(reach, dtype=torch.float64, device=device)[:, None]
                angles = places * step * self._speed[0].to(device)
                self._turns[key] = (angles.cos().float(), angles.sin().float())
        return self._turns[key]

    def compose(self, device: torch.device) -> bool:
        """Whether turning by a and then by b turns by a + b, up to one length for all positions, as every rotary
        embedding with fixed frequencies does. Waits for the device at the first call."""
        if self._speed is None:
            self._speed = self._found_speed(device)
        return self._speed[1] > 0

    @lasting()
    def _found_speed(self, device: torch.device) -> tuple[Tensor, float]:
        """Angles of one step, and the length of a turn; 0 where turns do not compose."""
        cos, sin = self.table(device, torch.float32)
        length = cos[0].double().mean()
        speed = torch.atan2(sin[1].double(), cos[1].double())
        angles = torch.arange(cos.shape[0], dtype=torch.float64, device=device)[:, None] * speed
        apart = torch.maximum((angles.cos() * length - cos).abs().amax(), (angles.sin() * length - sin).abs().amax())
        return speed, float(torch.where(apart < 0.01 * length, length, 0.0))

    def half_table(self, device: torch.device, limit: int) -> tuple[Tensor, Tensor]:
        """The same, worked out in float32 and kept in float16, for kernels that rotate half-precision states."""
        key = (device, torch.float16)
        if key not in self._kept or self._kept[key][0].shape[0] < limit:
            cos, sin = self.table(device, torch.float32, limit)
            with lasting():
                self._kept[key] = (cos.half(), sin.half())
        cos, sin = self._kept[key]
        return cos[:limit], sin[:limit]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2*R dimensions of states (..., D) by half-tables (..., R); the rest passes unchanged."""
    half = cos.shape[-1]
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    first, second = states[..., :half], states[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rest = states[..., 2 * half :]
    return torch.cat((*turned, rest), -1) if rest.shape[-1] else torch.cat(turned, -1)


@dataclass(frozen=True)
class Positions:
    """How entries and queries are placed.

    `absolute`: the states in the pyramid are rotated already and nothing is done here. `granular`: they are not, and
    every entry takes its rank in its cover. Only distances matter to a rotation, so ranks are counted backwards from
    `anchor`, the position of the first token of the window: they do not depend on how many entries other covers hold.
    A block whose window begins with the text has nothing before it and stands at its true positions.
    """

    kind: PositionKind = "absolute"
    rotary: Rotary | None = None
    anchor: int = 0

    @classmethod
    def granular(cls, rotary: Rotary, window: int) -> Positions:
        """Granular positions for covers whose window and block span at most `window` tokens."""
        limit = min(rotary.limit, MOST_RANKS)
        if window >= limit:
            raise SettingError(
                f"window and block take {window} positions, but the model was trained for {rotary.limit}; "
                "choose a smaller window or block"
            )
        return cls("granular", rotary, limit - window)

    def base(self, start: Tensor) -> Tensor:
        """Position of the first token of windows that start at `start` (N,)."""
        return torch.where(start > 0, self.anchor, 0)

    def check(self, entries: int, reach: int = 0) -> None:
        """Refuses covers whose ranks would leave the trained window.

        Args:
            entries: most entries before a window.
            reach: most tokens from the start of a window that does not begin with the text to the end of its block.
        """
        if self.rotary is None:
            return
        room = min(self.rotary.limit, MOST_RANKS) - self.anchor
        if reach > room:
            raise SettingError(
                f"a window and its block span {reach} tokens, but positions were made for {room}; "
                "choose a smaller window or block, or make them with Positions.granular(rotary, window + chunk + block)"
            )
        if entries > self.anchor:
            raise SettingError(
                f"a cover of {entries} entries before its window does not fit the {self.anchor} positions that the "
                "model's trained window leaves; lower the budget, add a coarser level "
                "(e.g. levels=(1, 64, 1024, 16384)), drop the rest, or choose a method that reads less of long texts"
            )
