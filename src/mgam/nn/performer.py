"""Performer: softmax attention by positive random features (Choromanski et al. 2021, arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgam.nn.base import Seen, SelfAttention, State, above

CHUNK = 64
"""Tokens whose pairs are written out at a time; it changes nothing in the result."""


class PerformerAttention(SelfAttention):
    """FAVOR+: exp(q.k) as the mean of products of positive features, so that a text is summed up in one matrix.

    A feature of a query is divided by the largest of that query alone, which cancels; features of keys are not
    stabilised by anything that later tokens have a part in. Sums are in float32 at least; nothing is added to them.
    """

    features: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        rank: int | None = None,
        seed: int = 0,
        **base: Any,
    ) -> None:
        super().__init__(width, heads, kv_heads, **base)
        rank = math.ceil(self.dim * math.log(max(self.dim, 3))) if rank is None else rank
        above("rank", rank, 1)
        self.register_buffer("features", orthogonal(rank, self.dim, seed))

    def redraw(self, seed: int) -> None:
        """Other random features (the paper: every thousand steps of training)."""
        self.features.copy_(orthogonal(self.features.shape[0], self.dim, seed))

    def attend(self, seen: Seen) -> Tensor:
        """Sums over the whole text, or over the past."""
        q, k = of_queries(seen.q.unflatten(1, (self.kv_heads, -1)), self.features), of_keys(seen.k, self.features)
        v = torch.nn.functional.pad(seen.v.to(k.dtype), (0, 1), value=1.0)
        if not self.causal:
            return _divided(q @ (k.transpose(-1, -2) @ v)[:, :, None]).flatten(1, 2).to(seen.v.dtype)
        return self._scan(q, k, v, torch.zeros_like(k[:, :, :1].transpose(-1, -2) @ v[:, :, :1]))[0].to(seen.v.dtype)

    def step(self, states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next tokens; what is kept does not grow with the text."""
        state = self._begun(states, state)
        q, new = self._project(states, state.tokens)
        q, k = of_queries(q.unflatten(1, (self.kv_heads, -1)), self.features), of_keys(new["k"], self.features)
        v = torch.nn.functional.pad(new["v"].to(k.dtype), (0, 1), value=1.0)
        none = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
        out, total = self._scan(q, k, v, state.kept.get("sum", none))
        return self._merge(out.to(new["v"].dtype)), State({"sum": total}, state.tokens + states.shape[1])

    def _scan(self, q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, K, G, L, M), k (B, K, L, M), v (B, K, L, D+1), before (B, K, M, D+1) -> (B, H, L, D), the new sum."""
        length = k.shape[2]
        short = -length % CHUNK
        q, k, v = (torch.nn.functional.pad(part, (0, 0, 0, short)) for part in (q, k, v))
        q = q.unflatten(3, (-1, CHUNK))
        k, v = k.unflatten(2, (-1, CHUNK)), v.unflatten(2, (-1, CHUNK))
        sums = k.transpose(-1, -2) @ v
        past = before[:, :, None] + sums.cumsum(2) - sums
        near = (q @ k[:, :, None].transpose(-1, -2)).tril()
        out = q @ past[:, :, None] + near @ v[:, :, None]
        return _divided(out).flatten(3, 4)[:, :, :, :length].flatten(1, 2), before + sums.sum(2)


def of_queries(q: Tensor, features: Tensor) -> Tensor:
    """Features (..., T, M) of queries (..., T, D)."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.25
    logits = wide @ features.to(wide).T
    return torch.exp(logits - logits.amax(-1, keepdim=True).detach())


def of_keys(k: Tensor, features: Tensor) -> Tensor:
    """Features (..., T, M) of keys (..., T, D)."""
    wide = k.to(torch.promote_types(k.dtype, torch.float32)) * k.shape[-1] ** -0.25
    return torch.exp(wide @ features.to(wide).T - wide.square().sum(-1, keepdim=True) / 2)


def _divided(sums: Tensor) -> Tensor:
    return sums[..., :-1] / sums[..., -1:].clamp_min(torch.finfo(sums.dtype).tiny)


def orthogonal(rank: int, dim: int, seed: int) -> Tensor:
    """Random directions (rank, dim), orthogonal in blocks of `dim`, with the lengths of normal vectors."""
    draw = torch.Generator().manual_seed(seed)
    blocks = [
        torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))[0].T for _ in range(-(-rank // dim))
    ]
    lengths = torch.randn(rank, dim, generator=draw, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rank] * lengths).float()
