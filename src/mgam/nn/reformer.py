"""Reformer: tokens that hash alike read one another (Kitaev et al. 2020, arXiv 2001.04451)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgam.merge import Part, merge
from mgam.nn.base import Seen, SelfAttention, above
from mgam.nn.sparse import ELEMENTS, softmax

ITSELF = -5e4
"""A token's logit for itself: it reads itself only where there is nothing else."""
DIRECTIONS = 32
"""Directions of one hash at most; more buckets are told apart by several hashes, so that cost grows by their number."""
HASHES = 4


class ReformerAttention(SelfAttention):
    """Keys are normed queries; tokens are sorted by hash and position, and read their chunk and the one before it.

    Hashes are of queries before they are rotated, so that equal tokens meet wherever they stand; with `hash_rotated`
    after, so that place counts too: a model whose only positions are rotations needs it to find what stands so many
    tokens back. With fewer KV heads than heads, the heads of a group share values.
    Causal by position; but which tokens meet in a chunk depends on all tokens, later ones included: a published leak.
    Texts of any length are padded by tokens that nobody reads.
    """

    LEAK = "selection-leak(text): chunks are cut from all tokens sorted by hash"
    turns: Tensor

    def __init__(
        self, width: int, heads: int, kv_heads: int | None = None, *, bucket: int = 32, rounds: int = 4, seed: int = 0,
        hash_rotated: bool = False, **base: Any,
    ) -> None:  # fmt: skip
        super().__init__(width, heads, kv_heads, **base)
        above("bucket", bucket, 1)
        above("rounds", rounds, 1)
        self.bucket, self.rounds, self.hash_rotated = bucket, rounds, hash_rotated
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("turns", torch.randn(rounds, self.dim, HASHES * DIRECTIONS, generator=draw))
        del self.key

    def _project(self, states: Tensor, first: int) -> tuple[Tensor, dict[str, Tensor]]:
        q = self.split(self.query(states))
        return q, {"k": q, "v": self.split(self.value(states))}

    def attend(self, seen: Seen) -> Tensor:
        """Rounds of hashing, joined as parts of one softmax; all tokens are hashed and rotated anew at every call."""
        q, v = self.turned(seen.k, 0), seen.v.repeat_interleave(self.heads // self.kv_heads, 1)
        hashed = q if self.hash_rotated else seen.k
        rounds = [self._round(hashed, q, v, self.turns[one]) for one in range(self.rounds)]
        return merge(rounds).out[:, :, seen.first :]

    def hashed(self, q: Tensor, turns: Tensor) -> Tensor:
        """Bucket numbers (B, H, T) of queries (B, H, T, D) by random directions (D, any)."""
        found = torch.zeros(q.shape[:3], dtype=torch.long, device=q.device)
        halves = _directions(q.shape[2] // self.bucket)
        for half, turn in zip(halves, turns[:, : sum(halves)].split(halves, 1), strict=True):
            turned = q @ turn.to(q)
            found = found * 2 * half + torch.cat((turned, -turned), -1).argmax(-1)
        return found

    def _round(self, hashed: Tensor, q: Tensor, v: Tensor, turns: Tensor) -> Part:
        """One round over q, v (B, H, T, D), sorted by the hashes of `hashed` (B, H, T, D)."""
        tokens, size = q.shape[2], self.bucket
        with torch.no_grad():
            order = (self.hashed(hashed, turns) * tokens + torch.arange(tokens, device=q.device)).argsort(-1)
        wide = order[..., None].expand_as(q)
        short = -tokens % size
        place = torch.nn.functional.pad(order, (0, short), value=-1).unflatten(2, (-1, size))
        sorted_q, sorted_v = (
            torch.nn.functional.pad(part.gather(2, wide), (0, 0, 0, short)).unflatten(2, (-1, size)) for part in (q, v)
        )
        chunks = place.shape[2]
        step = max(1, ELEMENTS // (q.shape[0] * q.shape[1] * size * (2 * size + 4 * q.shape[3])))
        parts = []
        for low in range(0, chunks, step):
            own = torch.arange(low, min(low + step, chunks), device=q.device)
            near = torch.stack(((own - 1) % chunks, own), 1) if chunks > 1 else own[:, None]
            parts.append(self._chunks(sorted_q, sorted_v, place, own, near))
        out, lse = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("out", "lse"))
        back = order.argsort(-1)
        out = out.flatten(2, 3)[:, :, :tokens].gather(2, back[..., None].expand_as(q))
        return Part(out, lse.flatten(2, 3)[:, :, :tokens].gather(2, back))

    def _chunks(self, q: Tensor, v: Tensor, place: Tensor, own: Tensor, near: Tensor) -> Part:
        """Chunks `own` (n,) over chunks `near` (n, 1 or 2), of sorted tokens q, v (B, H, N, size, D)."""
        k = torch.nn.functional.normalize(q[:, :, near].flatten(3, 4), dim=-1)
        mine, other = place[:, :, own][..., None], place[:, :, near].flatten(3, 4)[..., None, :]
        sees = (other >= 0) & (mine >= 0)
        if self.causal:
            sees = sees & (other <= mine)
        logits = self.scale * q[:, :, own] @ k.transpose(-1, -2)
        return softmax(logits.masked_fill(mine == other, ITSELF), sees, v[:, :, near].flatten(3, 4))


def _directions(buckets: int) -> list[int]:
    """Directions of each hash, of which n tell 2n buckets apart, for so many buckets or a few more."""
    found: list[int] = []
    while buckets > 2 * DIRECTIONS and len(found) < HASHES - 1:
        found.append(DIRECTIONS)
        buckets = -(-buckets // (2 * DIRECTIONS))
    return [*found, max(1, min(DIRECTIONS, buckets // 2))]
