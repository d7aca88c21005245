"""Reformer: tokens that hash alike read one another (Kitaev et al. 2020, arXiv 2001.04451)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgam.errors import SettingError
from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import softmax

ITSELF = -5e4
"""Added to a token's logit for itself: it reads itself only where there is nothing else."""
MOST_BUCKETS = 4096


class ReformerAttention(SelfAttention):
    """Keys are normed queries; tokens are sorted by hash and position, and read their chunk and the one before it.

    Causal by position; but which tokens meet in a chunk depends on all tokens, later ones included: a published leak.
    Texts of any length are padded by tokens that nobody reads.
    """

    LEAK = "selection-leak(text): chunks are cut from all tokens sorted by hash"
    turns: Tensor

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, bucket: int = 32, rounds: int = 4, seed: int = 0,
        **base: Any,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, kv_heads, **base)
        if self.kv_heads != self.heads:
            raise SettingError(f"kv_heads={kv_heads}: ReformerAttention shares queries and keys; leave kv_heads out")
        above("bucket", bucket, 1)
        above("rounds", rounds, 1)
        self.bucket, self.rounds = bucket, rounds
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("turns", torch.randn(rounds, self.dim, MOST_BUCKETS // 2, generator=draw))
        del self.key

    def _project(self, states: Tensor, first: int) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.turned(self.split(self.query(states)), first)
        return q, {"k": q, "v": self.split(self.value(states))}

    def attend(self, seen: Seen) -> Tensor:
        """Rounds of hashing, joined as parts of one softmax; all tokens are hashed anew at every call."""
        tokens = seen.k.shape[2]
        buckets = min(MOST_BUCKETS, 2 * max(1, tokens // self.bucket // 2))
        rounds = [self._round(seen.k, seen.v, self.turns[one, :, : buckets // 2]) for one in range(self.rounds)]
        return merge(rounds).out[:, :, seen.first :]

    def _round(self, q: Tensor, v: Tensor, turn: Tensor) -> Part:
        tokens, size = q.shape[2], self.bucket
        with torch.no_grad():
            turned = q @ turn.to(q)
            hashed = torch.cat((turned, -turned), -1).argmax(-1)
            order = (hashed * tokens + torch.arange(tokens, device=q.device)).argsort(-1)
        wide = order[..., None].expand_as(q)
        short = -tokens % size
        place = torch.nn.functional.pad(order, (0, short), value=-1).unflatten(2, (-1, size))
        sorted_q, sorted_v = (
            torch.nn.functional.pad(part.gather(2, wide), (0, 0, 0, short)).unflatten(2, (-1, size)) for part in (q, v)
        )
        k = torch.nn.functional.normalize(sorted_q, dim=-1)
        if place.shape[2] > 1:
            k, near_v, near = (torch.cat((part.roll(1, 2), part), 3) for part in (k, sorted_v, place))
        else:
            near_v, near = sorted_v, place
        own, other = place[..., None], near[..., None, :]
        sees = (other >= 0) & (own >= 0)
        if self.causal:
            sees = sees & (other <= own)
        logits = self.scale * sorted_q @ k.transpose(-1, -2)
        part = softmax(logits.masked_fill(own == other, 0) + ITSELF * (own == other), sees, near_v)
        back = order.argsort(-1)
        out = part.out.flatten(2, 3)[:, :, :tokens].gather(2, back[..., None].expand_as(q))
        return Part(out, part.lse.flatten(2, 3)[:, :, :tokens].gather(2, back))
