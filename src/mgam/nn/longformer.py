"""Longformer: a window, and global tokens with projections of their own (Beltagy et al. 2020, arXiv 2004.05150)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mgam.nn.base import Seen
from mgam.nn.local import LocalAttention
from mgam.nn.sparse import over_all, over_entries


class LongformerAttention(LocalAttention):
    """Window (dilated where `stride` > 1) and leading global tokens.

    A global query reads all tokens (its past, if causal) through global projections of queries, keys and values, which
    begin as copies of the ordinary ones. Others read global tokens by their ordinary keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int = 64,
        stride: int = 1,
        global_tokens: int = 1,
        **base: Any,
    ) -> None:
        kind: Any = "dilated" if stride > 1 else "sliding"
        super().__init__(
            width, heads, kv_heads, kind=kind, window=window, stride=stride, global_tokens=global_tokens, **base
        )
        self.global_query: nn.Module
        self.global_key: nn.Module
        self.global_value: nn.Module
        self.copy_projections()

    def copy_projections(self) -> None:
        """Makes the global projections copies of the ordinary ones."""
        self.global_query, self.global_key = copy.deepcopy(self.query), copy.deepcopy(self.key)
        self.global_value = copy.deepcopy(self.value)

    def extra(self, states: Tensor, q: Tensor, first: int) -> dict[str, Tensor]:
        """Keys and values for global queries; causal ones read no token but themselves."""
        if self.causal:
            states = states[:, : max(0, self.global_tokens - first)]
        return {
            "global_k": self.turned(self.split(self.global_key(states)), first),
            "global_v": self.split(self.global_value(states)),
        }

    def attend(self, seen: Seen) -> Tensor:
        """Local queries by the window, global ones by their own projections."""
        out = self.local(seen, self.sees, seen.q)
        count = min(max(0, self.global_tokens - seen.first), out.shape[2])
        if not count:
            return out
        q = self.turned(self.split(self.global_query(seen.states[:, :count])), seen.first)
        k, v = seen.more["global_k"], seen.more["global_v"]
        if self.causal:
            found = over_entries(q, k, v, seen.own[:count] + 1, self.scale).out
        else:
            found = over_all(q, k, v, self.scale)
        return torch.cat((found, out[:, :, count:]), 2)
