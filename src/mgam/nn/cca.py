"""Core context aware attention: groups of the past as core tokens, the near past as it is (arXiv 2412.12465)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import by_blocks, over_entries, spans

BLOCK = 64
"""Queries that gather their keys together; it changes nothing in the result."""


class CoreContextAttention(SelfAttention):
    """An exact partition of the past: core tokens of `group` tokens, then the last `window` tokens and a few more.

    A core token is the mean of its group's keys (and values) by the attention of the group's last query to them; the
    query heads of a KV head agree on it, so that the cache stays small. Query t (from 0) reads the first
    (t + 1 - window) // group core tokens and every token after them.

    Args:
        mass: whether a core token counts as often as it has tokens (the paper: once).
    """

    BIDIRECTIONAL = False

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        group: int = 16,
        window: int = 64,
        mass: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        above("group", group, 1)
        above("window", window, 1)
        self.group, self.window, self.mass = group, window, mass

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """The last query of each group makes its core token."""
        return {"q": q}

    def cores(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, N, D) of the complete groups."""
        count = seen.k.shape[2] // self.group
        k, v = (part[:, :, : count * self.group].unflatten(2, (count, self.group)) for part in (seen.k, seen.v))
        last = seen.more["q"][:, :, self.group - 1 : count * self.group : self.group].unflatten(1, (self.kv_heads, -1))
        logits = self.scale * torch.einsum("bkgnd,bknsd->bkns", last, k) / last.shape[2]
        weights = torch.softmax(logits, -1)[..., None]
        return (weights * k).sum(3), (weights * v).sum(3)

    def attend(self, seen: Seen) -> Tensor:
        """Both parts, joined as one softmax."""
        group, window = self.group, self.window

        def cores_of(query: Tensor) -> Tensor:
            return (query + 1 - window).clamp_min(0) // group

        index = spans(seen.first, seen.q.shape[2], BLOCK, min(window + group, seen.k.shape[2]), 0, seen.q.device)

        def see(query: Tensor, key: Tensor) -> Tensor:
            return (key >= cores_of(query) * group) & (key <= query)

        near = by_blocks(seen.q, seen.k, seen.v, seen.first, BLOCK, index, see, self.scale)
        if seen.k.shape[2] < group:
            return near.out
        k, v = self.cores(seen)
        far = over_entries(seen.q, k, v, cores_of(seen.own), self.scale)
        far = Part(far.out, far.lse + math.log(group) * self.mass)
        return merge([far, near]).out
