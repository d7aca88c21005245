"""Performer: softmax attention by positive random features (Choromanski et al. 2021, arXiv 2009.14794)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgam.nn.base import Seen, SelfAttention, State, above

# Shape letters: B rows, H query heads, K KV heads, G = H/K, L queries, S keys, N chunks of C tokens, D, M features.
# asking, told: logarithms of features of queries and keys. values: D numbers and a 1, whose sum divides the others.

CHUNK = 64
"""Tokens between which no sums are kept, a power of two; it changes nothing in the result."""
TOGETHER = 1024
"""Tokens whose features are held at a time."""
NOTHING = -1e30
"""Logarithm of a feature that is not there."""


class PerformerAttention(SelfAttention):
    """FAVOR+: exp(q.k) as the mean of products of positive features, so that a text is summed up in one matrix.

    Features are kept as logarithms. A sum over keys goes with the largest logarithm of each feature among these keys,
    and a query divides by its largest product with those. Both cancel: large keys and queries do not vanish, and later
    keys have no part in an output. Sums are in float32 at least.
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
        if not self.causal:
            return attend(seen.q, seen.k, seen.v, self.features, self.scale)
        return self._past(seen.q, seen.k, seen.v, {})[0]

    def step(self, states: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The next tokens; what is kept does not grow with the text."""
        state = self._begun(states, state)
        q, new = self._project(states, state.tokens)
        out, kept = self._past(q, new["k"], new["v"], state.kept)
        return self._merge(out), State(kept, state.tokens + states.shape[1])

    def _past(self, q: Tensor, k: Tensor, v: Tensor, before: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Queries (B, H, L, D) over keys and values (B, K, L, D) of their past: their outputs, and the new sums."""
        outs = []
        for parts in zip(q.split(TOGETHER, 2), k.split(TOGETHER, 2), v.split(TOGETHER, 2), strict=True):
            out, before = self._part(*parts, before)
            outs.append(out)
        return torch.cat(outs, 2), before

    def _part(self, q: Tensor, k: Tensor, v: Tensor, before: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of tokens whose features are held at a time."""
        length = k.shape[2]
        size = min(CHUNK, 1 << max(0, length - 1).bit_length())
        short = -length % size
        with torch.autocast(q.device.type, enabled=False):  # half precision has no room for sums
            asking, told, values = prepared(q, k, v, self.features, self.scale)
            asking = F.pad(asking, (0, 0, 0, short)).unflatten(3, (-1, size))
            told = F.pad(told, (0, 0, 0, short), value=NOTHING).unflatten(2, (-1, size))
            values = F.pad(values, (0, 0, 0, short)).unflatten(2, (-1, size))
            peaks, totals = _sums(before, told, values)
            top, far = asked(asking, peaks[:, :, None, :-1])
            found = _divided(joined((top, far @ totals[:, :, None, :-1]), near(asking, told, values))[1])
        out = found.flatten(3, 4)[:, :, :, :length].flatten(1, 2).to(v.dtype)
        return out, {"peak": peaks[:, :, -1].clone(), "sum": totals[:, :, -1].clone()}


def _sums(before: dict[str, Tensor], told: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums before each chunk and after the last: peaks (B, K, N+1, M) and totals (B, K, N+1, M, D+1).

    Shapes: told (B, K, N, C, M), values (B, K, N, C, D+1), of chunks of C tokens.
    """
    own, added = summed(told, values)
    first = before["peak"] if before else own.new_full((*own.shape[:2], own.shape[3]), NOTHING)
    peaks = torch.cat((first[:, :, None], own), 2).cummax(2).values
    fades = torch.exp(peaks[:, :, :-1] - peaks[:, :, 1:])[..., None]
    added = added * torch.exp(own - peaks[:, :, 1:])[..., None]
    totals = [before["sum"] if before else added.new_zeros((*added.shape[:2], *added.shape[3:]))]
    for number in range(added.shape[2]):
        totals.append(torch.addcmul(added[:, :, number], totals[-1], fades[:, :, number]))
    return peaks, torch.stack(totals, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, features: Tensor, scale: float) -> Tensor:
    """Every query over all keys: q (B, H, L, D), k and v (B, K, S, D), features (M, D) -> (B, H, L, D)."""
    with torch.autocast(q.device.type, enabled=False):
        asking, told, values = prepared(q, k, v, features, scale)
        peak, total = summed(told, values)
        found = asked(asking, peak[:, :, None])[1] @ total[:, :, None]
        return _divided(found).flatten(1, 2).to(v.dtype)


def prepared(q: Tensor, k: Tensor, v: Tensor, features: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of features of queries (B, K, G, L, M) and keys (B, K, S, M), and values (B, K, S, D+1)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (part.to(wide) * scale**0.5 for part in (q.unflatten(1, (k.shape[1], -1)), k))
    directions = features.to(wide).T
    return q @ directions, k @ directions - k.square().sum(-1, keepdim=True) / 2, F.pad(v.to(wide), (0, 1), value=1.0)


def summed(told: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., S, D+1) summed by features (..., S, M): the largest of each (..., M), and sums (..., M, D+1).

    Sums are divided by the exponential of the largest.
    """
    peak = told.detach().amax(-2)
    return peak, torch.exp(told - peak[..., None, :]).transpose(-1, -2) @ values


def asked(asking: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Features of queries (..., L, M) that meet keys with these peaks (..., M), divided by the largest of each query.

    Returns the logarithm (..., L, 1) of what they were divided by, and the features (..., L, M).
    """
    logs = asking + peak[..., None, :]
    top = logs.detach().amax(-1, keepdim=True)
    return top, torch.exp(logs - top)


def near(asking: Tensor, told: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What queries find among the keys of their own chunk up to themselves, as in `joined`.

    A chunk is cut in halves, these again, and so on: each right half reads its left half, which lies in its past.

    Shapes: asking (B, K, G, N, C, M), told (B, K, N, C, M), values (B, K, N, C, D+1); C is a power of two.
    """
    told, values = told[:, :, None], values[:, :, None]
    top = (asking + told).detach().amax(-1, keepdim=True)
    out = torch.exp(asking + told - top).sum(-1, keepdim=True) * values  # itself
    wide = 1
    while wide < asking.shape[-2]:
        left_k, left_v = (part.unflatten(-2, (-1, 2, wide))[..., 0, :, :] for part in (told, values))
        peak = left_k.detach().amax(-2)
        more, weights = asked(asking.unflatten(-2, (-1, 2, wide))[..., 1, :, :], peak)
        weights = weights @ torch.exp(left_k - peak[..., None, :]).transpose(-1, -2)
        (left_top, top), (left, out) = (part.unflatten(-2, (-1, 2, wide)).unbind(-3) for part in (top, out))
        top, out = joined((top, out), (more, weights @ left_v))
        top, out = (torch.stack(pair, -3).flatten(-4, -2) for pair in ((left_top, top), (left, out)))
        wide *= 2
    return top, out


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of two findings: logarithms (..., L, 1) of what they were divided by, and sums (..., L, D+1)."""
    top = torch.maximum(one[0], other[0])
    return top, one[1] * torch.exp(one[0] - top) + other[1] * torch.exp(other[0] - top)


def _divided(sums: Tensor) -> Tensor:
    return sums[..., :-1] / sums[..., -1:]


def orthogonal(rank: int, dim: int, seed: int) -> Tensor:
    """Random directions (rank, dim), orthogonal in blocks of `dim`, with the lengths of normal vectors."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randn(-(-rank // dim), dim, dim, generator=draw, dtype=torch.float64)
    turns, triangles = torch.linalg.qr(blocks)
    turns = (
        turns * triangles.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    )  # else no direction is as likely as its opposite
    lengths = torch.randn(rank, dim, generator=draw, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (turns.transpose(-1, -2).flatten(0, 1)[:rank] * lengths).float()
