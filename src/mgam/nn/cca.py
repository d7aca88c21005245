"""Core context aware attention: groups of the past as core tokens, the near past as it is (arXiv 2412.12465)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, State, above, last, longer
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

    def known(self, q: Tensor, new: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """Keys and values, and the core tokens: each is made once, as its group's last query comes."""
        known, group, tokens = super().known(q, new, state), self.group, state.tokens + q.shape[2]
        done, ended = state.tokens // group, tokens // group
        if ended > done:
            place = slice(done * group - tokens, ended * group - tokens or None)  # from the end: older ones may be gone
            k, v = (known[name][:, :, place].unflatten(2, (-1, group)) for name in ("k", "v"))
            ends = q[:, :, (done + 1) * group - 1 - state.tokens :: group]
            for name, part in zip(("core_k", "core_v"), self.cores(ends, k, v), strict=True):
                known[name] = longer(known.get(name), part)
        return known

    def keep(self, known: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Core tokens, and the tokens after those that the next query reads: fewer than `window + group`."""
        near = tokens - int(self.cores_of(torch.tensor(tokens))) * self.group
        return known | {name: last(known[name], near) for name in ("k", "v")}

    def cores_of(self, query: Tensor) -> Tensor:
        """How many core tokens queries at these positions read."""
        return (query + 1 - self.window).clamp_min(0) // self.group

    def cores(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, N, D) of groups (B, K, N, group, D) by their last queries (B, H, N, D)."""
        q = q.unflatten(1, (self.kv_heads, -1))
        logits = self.scale * torch.einsum("bkgnd,bknsd->bkns", q, k) / q.shape[2]
        weights = torch.softmax(logits, -1)[..., None]
        return (weights * k).sum(3), (weights * v).sum(3)

    def attend(self, seen: Seen) -> Tensor:
        """Both parts, joined as one softmax."""
        group, held, gone = self.group, seen.k.shape[2], seen.gone
        block = min(BLOCK, seen.q.shape[2])

        def see(query: Tensor, key: Tensor) -> Tensor:
            return (key + gone >= self.cores_of(query + gone) * group) & (key <= query)

        first = seen.first - gone
        index = spans(first, seen.q.shape[2], block, min(self.window + group, held), 0, seen.q.device)
        near = by_blocks(seen.q, seen.k, seen.v, first, block, index, see, self.scale)
        if "core_k" not in seen.more:
            return near.out
        far = over_entries(seen.q, seen.more["core_k"], seen.more["core_v"], self.cores_of(seen.own), self.scale)
        far = Part(far.out, far.lse + math.log(group) * self.mass)
        return merge([far, near]).out
