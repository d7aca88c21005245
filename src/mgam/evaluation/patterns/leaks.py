"""Does an output depend on what it must not see? Perturbs later targets and compares bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def first_leak(read: Callable[[Tensor], Tensor], target: Tensor, places: Iterable[int] | None = None) -> int | None:
    """The first place i at which changing target positions after i changes outputs up to i; None if there is none.

    `read` maps targets (B, T, ...) to outputs (B, T, ...), the source held fixed inside it. CAB's own check cuts the
    target short instead; changing it also catches constants that depend on the length, and equality is exact.
    """
    whole = read(target)
    for place in places if places is not None else range(target.shape[1] - 1):
        changed = target.clone()
        changed[:, place + 1 :] = target[:, place + 1 :].flip(1).roll(1, 0 if target.shape[0] > 1 else 1)
        if torch.equal(changed, target):
            continue
        if not torch.equal(read(changed)[:, : place + 1], whole[:, : place + 1]):
            return place
    return None
