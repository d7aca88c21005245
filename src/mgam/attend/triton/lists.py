"""A cover as the kernels take it: index lists, counts and ranks on the device, without any wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgam.cover import Cover
from mgam.errors import SettingError
from mgam.levels import Levels
from mgam.positions import Positions
from mgam.schedule import Blocks


@dataclass(frozen=True)
class Lists:
    """What N blocks read, per KV head. Level 0 stands for the opened chunks, level l for summaries.

    Shapes: blocks (4, N) int64: row, start, length, window start; index[l] and ranks[l] (N, H, M_l) int64; counts (1+L, N, H).
    """

    levels: Levels
    blocks: Tensor
    size: int
    """Queries per block, padding included."""
    index: tuple[Tensor, ...]
    counts: Tensor
    ranks: tuple[Tensor, ...]
    """Distance of each entry to the window (`Cover.ranks`); the index lists themselves where positions are absolute."""
    mass: float = 1.0

    @classmethod
    def of(cls, cover: Cover, blocks: Blocks, device: torch.device, positions: Positions | None = None) -> Lists:
        """The lists of a cover; ranks are worked out only for granular positions."""
        table = torch.stack((blocks.row, blocks.start, blocks.length)).to(device)
        window = cover.window_start.to(device, torch.int64)[None]
        index = tuple(part.to(device).contiguous() for part in (cover.opened, *cover.summaries))
        ranks = index
        if positions is not None and positions.kind == "granular":
            first, others = cover.ranks()
            ranks = tuple(part.to(device).contiguous() for part in (first, *others))
        return cls(cover.levels, torch.cat((table, window)), blocks.size, index, counts_of(index), ranks, cover.mass)

    @property
    def bare(self) -> bool:
        """Whether nothing is read before the window."""
        return not any(part.shape[-1] for part in self.index)

    def steps(self) -> list[int]:
        """Tokens from one index to the next, per level."""
        return [self.levels.chunk, *self.levels.sizes[1:]]


def counts_of(index: Sequence[Tensor]) -> Tensor:
    """Entries that are not padding (levels, N, H), int32."""
    return torch.stack([(part >= 0).sum(-1, dtype=torch.int32) for part in index])


def check(lists: Lists, rows: int, tokens: int) -> None:
    """Refuses lists that a kernel would read wrongly. Waits for the device once.

    Raises:
        SettingError: naming every rule that is broken.
    """
    row, start, length, window = lists.blocks
    rules = {
        f"rows must be 0 ... {rows - 1}": ((row < 0) | (row >= rows)).any(),
        f"blocks must lie in the {tokens} tokens that the pyramid holds": ((start < 0) | (start + length > tokens)).any(),
        f"blocks hold at most {lists.size} queries": ((length < 0) | (length > lists.size)).any(),
        "a window must start between 0 and its block": ((window < 0) | (window > start)).any(),
    }
    for number, (index, step) in enumerate(zip(lists.index, lists.steps(), strict=True)):
        if not index.shape[-1]:
            continue
        name = "opened chunks" if number == 0 else f"summaries of level {number}"
        late = ((index + 1) * step > window[:, None, None]) & (index >= 0)
        rules[f"{name} must lie before the window"] = late.any() | (index < -1).any()
        pairs = (index[..., 1:] >= 0) & (index[..., 1:] <= index[..., :-1])
        rules[f"{name} must be sorted, without repeats, with -1 only at the end"] = pairs.any()
    broken = torch.stack(list(rules.values())).tolist()
    if any(broken):
        raise SettingError("cover refused: " + "; ".join(rule for rule, bad in zip(rules, broken, strict=True) if bad))
